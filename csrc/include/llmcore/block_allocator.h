// Who owns which block of a paged cache (Kwon et al., arXiv 2309.06180), and which blocks hold what is known already.
#pragma once
#include <cstddef>
#include <cstdint>
#include <list>
#include <unordered_map>
#include <utility>
#include <vector>

namespace llmcore {

// Blocks are counted references. A full block may be published under its tokens and what came before them; when nobody
// refers to it any more it stays, to be found by `match`, until its room is needed: the block released longest ago goes
// first. What came before is told by a number: a salt for a first block, else what `publish` or `match` gave for the
// block before. Contents are compared, not only hashes, so two prefixes are never taken for each other.
class BlockAllocator {
 public:
  using Content = uint64_t;
  static constexpr Content kSalts = uint64_t{1} << 32;  // salts are below

  BlockAllocator(int64_t num_blocks, int64_t block_size);

  int64_t num_free() const { return static_cast<int64_t>(free_.size() + idle_.size()); }  // published idle ones, too
  int64_t num_published() const { return static_cast<int64_t>(found_.size()); }
  int64_t references(int64_t block) const;

  // `count` blocks with one reference each. std::bad_alloc when there are fewer; nothing has changed then.
  std::vector<int64_t> take(int64_t count);
  void share(const std::vector<int64_t>& blocks);    // one more reference to each
  void release(const std::vector<int64_t>& blocks);  // one less; the last first, so that prefixes outlive their ends

  // Tells that `block`, to which the caller refers, holds these tokens. When another block is known to, that one stays
  // the published one. Gives what stands for the prefix up to here.
  Content publish(int64_t block, Content before, const std::vector<int64_t>& tokens);

  // The published blocks that hold the longest prefix of `tokens` in whole blocks, each with one more reference, and
  // what stands for that prefix.
  std::pair<std::vector<int64_t>, Content> match(const std::vector<int64_t>& tokens, Content salt);

 private:
  struct Key {
    Content before;
    std::vector<int64_t> tokens;
    bool operator==(const Key& other) const { return before == other.before && tokens == other.tokens; }
  };
  struct Hash {
    size_t operator()(const Key& key) const;
  };
  struct Found {
    int64_t block;
    Content content;
  };
  struct Block {
    int64_t references = 0;
    const Key* key = nullptr;              // of found_, when published
    std::list<int64_t>::iterator place{};  // in idle_, when published and without references
  };

  Block& at(int64_t block);
  void refer(int64_t block);

  int64_t block_size_;
  Content next_content_ = kSalts;
  std::vector<Block> blocks_;
  std::vector<int64_t> free_;  // neither referred to nor published
  std::list<int64_t> idle_;    // published without references, the longest idle first
  std::unordered_map<Key, Found, Hash> found_;
};

}  // namespace llmcore
