#include "group.h"

namespace esapn {
namespace {

// A hash table in the caches, by open addressing: it does not grow with the rows, as an array would.
struct Slot {
  uint32_t tag;  // the id's lower half
  int32_t index;
};

int slot_bits(int64_t ids) {
  int bits = 4;
  while ((int64_t(1) << bits) < 2 * ids) bits++;
  return bits;
}

uint64_t hash(int64_t id) { return uint64_t(id) * 0x9e3779b97f4a7c15u; }

template <class I>
Status check(const I* ids, int64_t count, int64_t rows) {
  bool bad = false;
  for (int64_t i = 0; i < count; i++) bad |= uint64_t(int64_t(ids[i])) >= uint64_t(rows);
  return bad ? OUT_OF_RANGE : OK;
}

template <class I>
void collect(Groups& groups, int32_t* tail, Slot* slots, int bits, const I* ids, int64_t count,
             int64_t skipped) {
  const int shift = 64 - bits;
  const uint64_t mask = (uint64_t(1) << bits) - 1;
  int64_t distinct = 0;
  for (int64_t i = 0; i < count; i++) {
    if (i + 16 < count) __builtin_prefetch(slots + (hash(int64_t(ids[i + 16])) >> shift), 1);
    const int64_t id = int64_t(ids[i]);
    groups.next[i] = -1;
    if (id == skipped) continue;
    uint64_t at = hash(id) >> shift;
    for (;; at = (at + 1) & mask) {
      Slot& slot = slots[at];
      if (slot.index < 0) {
        slot = {uint32_t(id), int32_t(distinct)};
        groups.id[distinct] = id;
        groups.head[distinct] = tail[distinct] = int32_t(i);
        distinct++;
        break;
      }
      if (slot.tag == uint32_t(id) && groups.id[slot.index] == id) {
        groups.next[tail[slot.index]] = int32_t(i);
        tail[slot.index] = int32_t(i);
        break;
      }
    }
  }
  groups.count = distinct;
}

}  // namespace

Status check_ids(const Ids& ids, int64_t rows) {
  return ids.wide ? check(static_cast<const int64_t*>(ids.data), ids.count, rows)
                  : check(static_cast<const int32_t*>(ids.data), ids.count, rows);
}

int64_t group_bytes(int64_t ids) {
  return 2 * Buffer::padded<int32_t>(ids) + 3 * Buffer::padded<int64_t>(ids) + Buffer::padded<uint8_t>(ids);
}

Status group(Groups& groups, Buffer& memory, const Table& table, const Ids& ids, int64_t skipped) {
  if (check_ids(ids, table.rows) != OK) return OUT_OF_RANGE;
  if (ids.count > INT32_MAX) return NO_MEMORY;  // positions have 32 bits
  groups.head = memory.take<int32_t>(ids.count);
  groups.next = memory.take<int32_t>(ids.count);
  groups.id = memory.take<int64_t>(ids.count);
  groups.start = memory.take<int64_t>(ids.count);
  groups.place = memory.take<int64_t>(ids.count);
  groups.level = memory.take<uint8_t>(ids.count);
  const int bits = slot_bits(ids.count);
  const int64_t size = int64_t(1) << bits;
  Buffer scratch(Buffer::padded<Slot>(size) + Buffer::padded<int32_t>(ids.count));
  if (!scratch.ok()) return NO_MEMORY;
  Slot* slots = scratch.take<Slot>(size);
  int32_t* tail = scratch.take<int32_t>(ids.count);
  for (int64_t i = 0; i < size; i++) slots[i] = {0, -1};
  if (ids.wide)
    collect(groups, tail, slots, bits, static_cast<const int64_t*>(ids.data), ids.count, skipped);
  else
    collect(groups, tail, slots, bits, static_cast<const int32_t*>(ids.data), ids.count, skipped);
  const Pages pages(table.page);
  for (int64_t u = 0; u < groups.count; u++) {
    if (u + 16 < groups.count) __builtin_prefetch(table.start_address(groups.id[u + 16]));
    const int64_t start = table.start(groups.id[u]);
    const int level = start < 0 || start >= table.capacity ? -1 : table.checked(table.page_level[pages.of(start)], start);
    if (level < 0) return OUT_OF_RANGE;
    groups.start[u] = start;
    groups.level[u] = uint8_t(level);
    groups.place[u] = groups.elements;
    groups.elements += table.sizes[level];
  }
  return OK;
}

}  // namespace esapn
