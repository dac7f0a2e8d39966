"""Model families as `transformers` knows them: for each, the two-way map between its config.json and ours, and between
its tensors' names and ours."""

from __future__ import annotations

from llmcore.models.config import ModelConfig
from llmcore.models.families.base import Family, HFConfig, Rule
from llmcore.models.families.bert import BERT
from llmcore.models.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from llmcore.models.families.gemma import GEMMA2, GEMMA3
from llmcore.models.families.gpt2 import GPT2
from llmcore.models.families.llama import GLM, LLAMA, MISTRAL, QWEN2, QWEN3, SMOLLM3
from llmcore.models.families.moe import GLM4_MOE, GPT_OSS, MIXTRAL, QWEN3_MOE
from llmcore.models.families.olmo2 import OLMO2
from llmcore.models.families.t5 import T5

# In the order in which `family_of` asks them: plainer ones first.
FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        LLAMA, GPT2, MISTRAL, QWEN2, QWEN3, SMOLLM3, GLM, OLMO2, GEMMA2, GEMMA3, MIXTRAL, QWEN3_MOE, GLM4_MOE, GPT_OSS,
        DEEPSEEK_V2, DEEPSEEK_V3, BERT, T5,
    )
}  # fmt: skip


def family_of(config: ModelConfig) -> Family:
    """The first family whose config.json can say all that `config` says.

    Raises:
        ValueError: when there is none.
    """
    for family in FAMILIES.values():
        if family.fits(config):
            return family
    raise ValueError(f"no family of transformers describes {config}; accepted: one of {', '.join(FAMILIES)}")


__all__ = ["FAMILIES", "Family", "HFConfig", "Rule", "family_of"]
