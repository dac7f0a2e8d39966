#include "llmcore/block_allocator.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <new>
#include <stdexcept>
#include <string>

#include "classes.h"

namespace py = pybind11;

namespace llmcore {

BlockAllocator::BlockAllocator(int64_t num_blocks, int64_t block_size) : block_size_(block_size) {
  if (num_blocks < 1 || block_size < 1)
    throw std::invalid_argument("num_blocks is " + std::to_string(num_blocks) + ", block_size " +
                                std::to_string(block_size) + "; accepted: 1 or more each");
  blocks_.resize(num_blocks);
  for (int64_t block = num_blocks; block-- > 0;) free_.push_back(block);  // handed out from 0 on
}

size_t BlockAllocator::Hash::operator()(const Key& key) const {
  uint64_t h = key.before * 0x9e3779b97f4a7c15u;
  for (const int64_t token : key.tokens) h = (h ^ static_cast<uint64_t>(token)) * 0xff51afd7ed558ccdu, h ^= h >> 32;
  return h;
}

BlockAllocator::Block& BlockAllocator::at(int64_t block) {
  if (block < 0 || block >= static_cast<int64_t>(blocks_.size()))
    throw std::out_of_range("block " + std::to_string(block) + "; accepted: 0 to " +
                            std::to_string(blocks_.size() - 1));
  return blocks_[block];
}

int64_t BlockAllocator::references(int64_t block) const {
  return const_cast<BlockAllocator*>(this)->at(block).references;
}

std::vector<int64_t> BlockAllocator::take(int64_t count) {
  if (count > num_free()) throw std::bad_alloc();
  std::vector<int64_t> taken;
  for (int64_t i = 0; i < count; ++i) {
    if (free_.empty()) {  // the published block that has been idle longest
      const int64_t block = idle_.front();
      idle_.pop_front();
      found_.erase(*blocks_[block].key);
      blocks_[block].key = nullptr;
      free_.push_back(block);
    }
    taken.push_back(free_.back());
    free_.pop_back();
    blocks_[taken.back()].references = 1;
  }
  return taken;
}

void BlockAllocator::refer(int64_t block) {
  Block& b = at(block);
  if (b.references++ == 0) idle_.erase(b.place);
}

void BlockAllocator::share(const std::vector<int64_t>& blocks) {
  for (const int64_t block : blocks)
    if (at(block).references == 0) throw std::invalid_argument("block " + std::to_string(block) + " is nobody's");
  for (const int64_t block : blocks) refer(block);
}

void BlockAllocator::release(const std::vector<int64_t>& blocks) {
  for (const int64_t block : blocks)
    if (at(block).references == 0) throw std::invalid_argument("block " + std::to_string(block) + " is nobody's");
  for (auto block = blocks.rbegin(); block != blocks.rend(); ++block) {
    Block& b = blocks_[*block];
    if (--b.references > 0) continue;
    if (b.key)
      b.place = idle_.insert(idle_.end(), *block);
    else
      free_.push_back(*block);
  }
}

BlockAllocator::Content BlockAllocator::publish(int64_t block, Content before, const std::vector<int64_t>& tokens) {
  if (static_cast<int64_t>(tokens.size()) != block_size_)
    throw std::invalid_argument("a block of " + std::to_string(tokens.size()) + " tokens; accepted: full ones of " +
                                std::to_string(block_size_));
  Block& b = at(block);
  if (b.references == 0) throw std::invalid_argument("block " + std::to_string(block) + " is nobody's");
  if (b.key) {  // another holder has told
    if (!(*b.key == Key{before, tokens}))
      throw std::invalid_argument("block " + std::to_string(block) + " is published with other tokens");
    return found_.at(*b.key).content;
  }
  const auto [entry, is_new] = found_.try_emplace(Key{before, tokens}, Found{block, next_content_});
  if (is_new) ++next_content_, b.key = &entry->first;
  return entry->second.content;
}

std::pair<std::vector<int64_t>, BlockAllocator::Content> BlockAllocator::match(const std::vector<int64_t>& tokens,
                                                                               Content salt) {
  std::pair<std::vector<int64_t>, Content> result{{}, salt};
  for (auto begin = tokens.begin(); tokens.end() - begin >= block_size_; begin += block_size_) {
    const auto entry = found_.find(Key{result.second, {begin, begin + block_size_}});
    if (entry == found_.end()) break;
    refer(entry->second.block);
    result.first.push_back(entry->second.block);
    result.second = entry->second.content;
  }
  return result;
}

void add_block_allocator(py::module_& m) {
  using A = BlockAllocator;
  py::class_<A>(m, "BlockAllocator", "Who owns which block of a paged cache: csrc/include/llmcore/block_allocator.h.")
      .def(py::init<int64_t, int64_t>(), py::arg("num_blocks"), py::arg("block_size"))
      .def_property_readonly("num_free", &A::num_free, "Blocks that can be taken, idle published ones among them.")
      .def_property_readonly("num_published", &A::num_published)
      .def("references", &A::references)
      .def("take", &A::take, "count -> blocks; MemoryError when there are fewer.")
      .def("share", &A::share)
      .def("release", &A::release)
      .def("publish", &A::publish, "(block, what stands for the prefix before, tokens) -> what stands for it with them")
      .def("match", &A::match, "(tokens, salt) -> (blocks of the longest known prefix, what stands for it)");
}

}  // namespace llmcore
