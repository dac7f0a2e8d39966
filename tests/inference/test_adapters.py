"""LoRA adapters chosen per request, against merged weights and against PEFT."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmcore.checkpoints import CheckpointError
from llmcore.inference.adapters import Adapter, Adapters, LowRank, applied, load_adapter
from llmcore.inference.engine import Engine
from llmcore.inference.params import SamplingParams
from llmcore.inference.speculation import DraftSpeculator, NGramSpeculator
from llmcore.layers import quantize_model
from llmcore.models import MLAConfig, ModelConfig, Transformer, gpt2, llama, llama_moe
from llmcore.models.pretrained import save_pretrained

ATTENTION = [f"self_attn.{p}_proj" for p in "qkvo"]
MLP = [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
PROMPTS = [[3, 1, 4, 1, 5], list(range(20)), [7] * 33, [60, 9, 2]]


def make(config: ModelConfig | None = None, seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(config or llama("tiny", vocab_size=64, max_positions=128, num_kv_heads=2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.eval()


def shape_of(config: ModelConfig, module: str) -> tuple[int, int]:
    """(out, in) of a layer of the Hugging Face form."""
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes = {"q_proj": (q, config.dim), "k_proj": (kv, config.dim), "v_proj": (kv, config.dim)}
    shapes |= {"o_proj": (config.dim, q), "down_proj": (config.dim, config.ffn_dim)}
    return shapes.get(module.split(".")[-1], (config.ffn_dim, config.dim))


def write(folder, config: ModelConfig, modules=(*ATTENTION, *MLP), rank=4, seed=1, tensors=None, **settings):
    """An adapter as PEFT writes it. Gives its tensors."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    ranks = settings.get("rank_pattern", {})
    if tensors is None:
        tensors = {}
        for layer in range(config.num_layers):
            for module in modules:
                out, inner = shape_of(config, module)
                r = next((n for key, n in ranks.items() if f".{module}".endswith(f".{key}")), rank)
                stem = f"base_model.model.model.layers.{layer}.{module}"
                tensors[f"{stem}.lora_A.weight"] = torch.randn(r, inner) * 0.2
                tensors[f"{stem}.lora_B.weight"] = torch.randn(out, r) * 0.2
    save_file(tensors, folder / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "bias": "none", "target_modules": list(modules)}
    (folder / "adapter_config.json").write_text(json.dumps(values | settings))
    return tensors


def merged(model: Transformer, adapter: Adapter) -> Transformer:
    """A model whose own weights do what the adapter does."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, low in adapter.layers.items():
            model.get_submodule(name).weight += low.b @ low.a
    return model


@torch.no_grad()
def logits(model: Transformer, prompt) -> torch.Tensor:
    return model.logits(model(torch.tensor([prompt])).hidden)[0]


@torch.no_grad()
def adapted_logits(model: Transformer, adapter: Adapter, prompt) -> torch.Tensor:
    tokens = torch.tensor(prompt)
    with applied(model, [adapter] * len(prompt)):
        hidden = model(tokens, cu_seqlens=torch.tensor([0, len(prompt)], dtype=torch.int32),
                       positions=torch.arange(len(prompt))).hidden  # fmt: skip
    return model.logits(hidden)


def theirs_merged(model: Transformer, tensors, scale, tmp_path) -> torch.Tensor:
    """`transformers` with weights merged by the definition, from the model's own files."""
    transformers = pytest.importorskip("transformers")
    save_pretrained(model, tmp_path)
    other = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    weights = dict(other.named_parameters())
    with torch.no_grad():
        for name, a in tensors.items():
            if name.endswith(".lora_A.weight"):
                stem = name.removesuffix(".lora_A.weight")
                b = tensors[f"{stem}.lora_B.weight"]
                weights[stem.removeprefix("base_model.model.") + ".weight"] += scale * b @ a
    return other


@pytest.mark.parametrize(
    "modules", [(*ATTENTION, *MLP), ("self_attn.v_proj",), ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")]
)
def test_the_sum_that_it_stands_for(tmp_path, modules):
    """Every layer as `transformers` with merged weights has it, whichever of our joint matrices a part is in."""
    model = make()
    tensors = write(tmp_path / "a", model.config, modules, rank=3, lora_alpha=6)
    adapter = load_adapter(tmp_path / "a", model)
    other = theirs_merged(model, tensors, 2.0, tmp_path / "m")
    for prompt in PROMPTS:
        with torch.no_grad():
            wanted = other(torch.tensor([prompt])).logits[0]
        got = adapted_logits(model, adapter, prompt)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
        torch.testing.assert_close(got, logits(merged(model, adapter), prompt), rtol=1e-5, atol=2e-5)
        assert (got - logits(model, prompt)).abs().max() > 0.1


def test_ranks_and_scales(tmp_path):
    model = make()
    settings = {"rank_pattern": {"q_proj": 2, "mlp.up_proj": 5}, "alpha_pattern": {"v_proj": 3}, "use_rslora": True}
    tensors = write(tmp_path, model.config, rank=4, **settings)
    adapter = load_adapter(tmp_path, model)
    low = adapter.layers["blocks.1.attention.qkv"]
    sizes = [64, 32, 32] if model.config.dim == 64 else [shape_of(model.config, f"{p}_proj")[0] for p in "qkv"]
    got = (low.b @ low.a).split(sizes)
    for part, p, scale in zip(got, "qkv", (8 / 2**0.5, 8 / 4**0.5, 3 / 4**0.5)):
        stem = f"base_model.model.model.layers.1.self_attn.{p}_proj"
        wanted = scale * tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]
        torch.testing.assert_close(part, wanted)
    assert len(adapter.layers["blocks.0.mlp.gate_up"].a) == 4 + 5
    assert adapter.num_parameters > 0


def test_as_peft_has_it(tmp_path):
    """Saved and run by PEFT itself."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    for index, (config, targets) in enumerate([
        (None, ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]),
        (gpt2("tiny", vocab_size=64, max_positions=128), ["c_attn", "c_fc", "c_proj"]),
    ]):  # fmt: skip
        model, folder = make(config), tmp_path / str(index)
        save_pretrained(model, folder / "model")
        base = transformers.AutoModelForCausalLM.from_pretrained(
            folder / "model", dtype=torch.float32, attn_implementation="eager"
        )
        settings = peft.LoraConfig(
            r=4, lora_alpha=9, target_modules=targets, init_lora_weights=False, use_rslora=index == 0,
            fan_in_fan_out=index == 1, alpha_pattern={targets[0]: 5}, task_type="CAUSAL_LM",
        )  # fmt: skip
        torch.manual_seed(3)
        other = peft.get_peft_model(base, settings).eval()
        other.save_pretrained(folder / "adapter")
        adapter = load_adapter(folder / "adapter", model)
        for prompt in PROMPTS:
            with torch.no_grad():
                wanted = other(torch.tensor([prompt])).logits[0]
            got = adapted_logits(model, adapter, prompt)
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
            assert (got - logits(model, prompt)).abs().max() > 0.05


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture(scope="module")
def adapters(model, tmp_path_factory) -> dict[str, Adapter]:
    root = tmp_path_factory.mktemp("adapters")
    write(root / "a", model.config, seed=1)
    write(root / "b", model.config, ("self_attn.q_proj", "mlp.down_proj"), rank=7, seed=2)
    return {"a": load_adapter(root / "a", model), "b": load_adapter(root / "b", model)}


def greedy(**more) -> dict:
    return {"temperature": 0, "max_tokens": 24, "ignore_eos": True} | more


def requests() -> tuple[list, list[SamplingParams]]:
    names = ["a", None, "b", "a", None, "b", "b", None]
    kinds = [
        greedy(), greedy(logprobs=1), greedy(n=2), greedy(temperature=1.0, seed=1), greedy(logprobs=2),
        greedy(temperature=0.8, seed=2, n=3), greedy(repetition_penalty=1.2), greedy(temperature=1.0, seed=3),
    ]  # fmt: skip
    return [PROMPTS[i % 4] for i in range(8)], [SamplingParams(**k, adapter=n) for k, n in zip(kinds, names)]


def tokens_of(outputs) -> list[list[list[int]]]:
    return [[choice.tokens for choice in output.choices] for output in outputs]


@pytest.mark.parametrize("options", [
    {}, {"max_batch_tokens": 24, "max_sequences": 12}, {"batch_invariant": True},
    {"cache_tokens": 160, "block_size": 4, "preemption": "swap"},
], ids=["plain", "chunks", "invariant", "small cache"])  # fmt: skip
def test_mixed_batches(model, adapters, options):
    """Requests with different adapters, or none, run together and get what each gets alone; those with an adapter what
    a model with merged weights gives, those without what an engine without adapters gives."""
    prompts, params = requests()
    engine = Engine(model, adapters=adapters, **options)
    together = engine.generate(prompts, params)
    assert engine.cache.num_free_blocks == engine.cache.num_blocks
    for prompt, wanted, output in zip(prompts, params, together):
        [alone] = Engine(model, adapters=adapters, **options).generate([prompt], wanted)
        assert tokens_of([alone]) == tokens_of([output])
        own = model if wanted.adapter is None else merged(model, adapters[wanted.adapter])
        plain = SamplingParams(**{**wanted.__dict__, "adapter": None})
        [other] = Engine(own, **options).generate([prompt], plain)
        assert tokens_of([other]) == tokens_of([output])
        if wanted.adapter is None and options.get("batch_invariant"):
            assert [c.logprobs for c in other.choices] == [c.logprobs for c in output.choices]  # every bit
    if "cache_tokens" in options:
        assert engine.stats().preemptions > 0


def test_rows_without_an_adapter_keep_their_bits(model, adapters):
    """Of one pass, whatever the other rows do; and rows with one do not depend on which rows they are."""
    x = torch.randint(64, (30,))
    positions, cu_seqlens = torch.arange(10).repeat(3), torch.tensor([0, 10, 20, 30], dtype=torch.int32)
    with torch.no_grad():
        plain = model(x, positions=positions, cu_seqlens=cu_seqlens).hidden
        with applied(model, [None] * 10 + [adapters["a"]] * 10 + [adapters["b"]] * 10):
            mixed = model(x, positions=positions, cu_seqlens=cu_seqlens).hidden
        again = model(x, positions=positions, cu_seqlens=cu_seqlens).hidden
    assert torch.equal(mixed[:10], plain[:10])
    assert not torch.allclose(mixed[10:20], plain[10:20], atol=1e-2)
    assert not torch.allclose(mixed[20:], plain[20:], atol=1e-2)
    assert torch.equal(again, plain)  # nothing of it is left in the model


def test_prefixes_are_told_apart(model, adapters):
    """Keys and values of a prompt that was run with other weights are no prefix."""
    engine = Engine(model, adapters=adapters)
    prompt = list(range(40))
    found = {}
    for name in (None, "a", "b", None, "a", "b"):
        [output] = engine.generate([prompt], SamplingParams(**greedy(adapter=name)))
        assert found.setdefault(name, output.choices[0].tokens) == output.choices[0].tokens
        assert output.cached_tokens == (0 if name not in found or len(found) < 3 else output.cached_tokens)
    assert output.cached_tokens == 32
    assert len({tuple(t) for t in found.values()}) == 3


def test_speculation(model, adapters):
    prompts, params = requests()
    expected = tokens_of(Engine(model, adapters=adapters).generate(prompts, params))
    limits = {"max_batch": 16, "max_rows": 64}
    for speculator in (DraftSpeculator(make(seed=4), 3, **limits), NGramSpeculator(3, min_match=1, **limits)):
        engine = Engine(model, adapters=adapters, speculator=speculator)
        assert tokens_of(engine.generate(prompts, params)) == expected
        assert engine.stats().draft_tokens > 0


def test_other_models(tmp_path):
    """Latent attention, shared experts and quantised weights."""
    mla = MLAConfig(kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16)
    latent = make(llama("tiny", vocab_size=64, max_positions=128, mla=mla, num_kv_heads=None))
    moe = make(llama_moe("tiny", vocab_size=64, max_positions=128))
    dense = make(llama("tiny", vocab_size=64, max_positions=128, dim=64, ffn_dim=128))
    for model, names in (
        (latent, ["attention.q", "attention.kv_a", "attention.out", "mlp.gate_up"]),
        (moe, ["attention.qkv", "attention.out"]),
        (quantize_model(copy.deepcopy(dense), "q8_0").requires_grad_(False), ["attention.qkv", "mlp.down"]),
    ):
        layers = {}
        for i in range(model.config.num_layers):
            for name in names:
                layer = model.get_submodule(f"blocks.{i}.{name}")
                a, b = torch.randn(3, layer.in_features) * 0.1, torch.randn(layer.out_features, 3) * 0.1
                layers[f"blocks.{i}.{name}"] = LowRank(a, b)
        adapter = Adapter(layers)
        engine = Engine(model, adapters={"x": adapter}, cache_tokens=1024)
        outputs = engine.generate(PROMPTS, [SamplingParams(**greedy(adapter=n)) for n in ("x", None, "x", None)])
        if model is not latent and model is not moe:
            plain = Engine(model, cache_tokens=1024).generate(PROMPTS, SamplingParams(**greedy()))
            assert [a == b for a, b in zip(tokens_of(outputs), tokens_of(plain))] == [False, True, False, True]
            continue
        merge = Engine(merged(model, adapter), cache_tokens=1024).generate(PROMPTS, SamplingParams(**greedy()))
        assert tokens_of([outputs[0], outputs[2]]) == tokens_of([merge[0], merge[2]])


def test_what_is_refused(model, tmp_path):
    tensors = write(tmp_path / "good", model.config)
    stem = "base_model.model.model.layers.0.self_attn.q_proj"

    def refuse(match, change=None, **settings):
        folder = tmp_path / "bad"
        changed = {name: tensor.clone() for name, tensor in tensors.items()}
        if change is not None:
            change(changed)
        write(folder, model.config, tensors=changed, **settings)
        with pytest.raises(CheckpointError, match=match) as error:
            Engine(model, adapters={"bad": folder})
        assert "bad" in str(error.value)

    refuse("peft_type is 'IA3'; accepted: 'LORA'", peft_type="IA3")
    refuse("use_dora is True", use_dora=True)
    refuse("bias is 'all'; accepted: 'none'", bias="all")
    refuse("modules_to_save is .'lm_head'.", modules_to_save=["lm_head"])
    refuse("r of .*q_proj' is None", r=None)
    refuse("accepted with r = 8", r=8)
    refuse("lora_alpha .*'x'", lora_alpha="x")
    refuse("rank_pattern is", rank_pattern={"(a+)+$": 4})
    refuse("lora_B.weight' is missing", lambda t: t.pop(f"{stem}.lora_B.weight"))
    refuse(r"accepted with r = 4: \(4, in_features\)", lambda t: t.update({f"{stem}.lora_A.weight": torch.ones(3, 64)}))
    refuse("the model's layer is", lambda t: t.update({f"{stem}.lora_A.weight": torch.ones(4, 9)}))
    refuse("the model's layer is", lambda t: t.update({f"{stem}.lora_B.weight": torch.ones(9, 4)}))
    refuse("NaN or infinity", lambda t: t[f"{stem}.lora_B.weight"].fill_(float("nan")))
    refuse("tensor 'x.weight'; accepted: base_model.model.MODULE", lambda t: t.update({"x.weight": torch.ones(1)}))
    for name in ("model.layers.9.self_attn.q_proj", "lm_head", "model.embed_tokens", "model.layers.0.mlp.nothing"):
        sides = {f"base_model.model.{name}.lora_{s}.weight": torch.ones(4, 4) for s in "AB"}
        refuse(f"'{name}' is no layer of this model that can be adapted", lambda t, sides=sides: t.update(sides))
    refuse("holds no tensors", lambda t: t.clear())
    (tmp_path / "bad" / "adapter_model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(CheckpointError, match="not readable as safetensors"):
        load_adapter(tmp_path / "bad", model)
    (tmp_path / "bad" / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no adapter_model\.safetensors"):
        load_adapter(tmp_path / "bad", model)
    with pytest.raises(CheckpointError, match="missing"):
        load_adapter(tmp_path / "nowhere", model)
    engine = Engine(model, adapters={"good": tmp_path / "good"})
    with pytest.raises(ValueError, match=r"adapter is 'other'; accepted: \['good'\], or None"):
        engine.add([1], SamplingParams(adapter="other"))
    good = load_adapter(tmp_path / "good", model)
    with pytest.raises(ValueError, match="the model's is"):
        Adapters(make(llama("tiny", vocab_size=64, dim=128, num_heads=4)), {"good": good})
    with pytest.raises(ValueError, match="no linear layer"):
        Adapters(model, {"x": Adapter({"blocks.0.nothing": LowRank(torch.ones(1, 64), torch.ones(64, 1))})})
    with pytest.raises(ValueError, match="has no layers"):
        Adapter({})
    assert load_file(tmp_path / "good" / "adapter_model.safetensors").keys() == tensors.keys()
