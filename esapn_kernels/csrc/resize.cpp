#include "resize.h"

#include <stddef.h>

namespace esapn {
namespace {

// The positions of distinct ids in the caches, by open addressing: an array over the table's rows would
// be larger than they are.
class Seen {
 public:
  static int64_t slots(int64_t ids) { return int64_t(1) << bits(ids); }
  Seen(int32_t* memory, const Ids& ids, int64_t admitted)
      : slots_(memory), ids_(ids), mask_(uint64_t(slots(admitted)) - 1), shift_(64 - bits(admitted)) {
    for (int64_t i = 0; i < slots(admitted); i++) slots_[i] = -1;
  }
  void fetch(int64_t id) const { __builtin_prefetch(slots_ + at(id), 1); }
  // Whether the id at this position is a new one.
  bool add(int64_t position) {
    const int64_t id = ids_[position];
    for (uint64_t i = at(id);; i = (i + 1) & mask_) {
      if (slots_[i] < 0) {
        slots_[i] = int32_t(position);
        return true;
      }
      if (ids_[slots_[i]] == id) return false;
    }
  }

 private:
  static int bits(int64_t ids) {
    int bits = 4;
    while ((int64_t(2) << bits) < 3 * ids) bits++;
    return bits;
  }
  uint64_t at(int64_t id) const { return (uint64_t(id) * 0x9e3779b97f4a7c15u) >> shift_; }

  int32_t* slots_;
  const Ids& ids_;
  uint64_t mask_;
  int shift_;
};

bool moves(Call call, int level, int n) {
  if (call == INSERT) return level < 0;
  return level >= (call == DEMOTE) && level < (call == PROMOTE ? n - 1 : n);
}

template <class I>
void settle(const Resize& resize, const int64_t* start) {
  const Movers& movers = resize.movers;
  I* row_start = static_cast<I*>(const_cast<void*>(resize.table.row_start));
  const int64_t total = movers.total(resize.table.n);
  ++*resize.moves;
  for (int64_t i = 0; i < total; i++) {
    if (i + 16 < total) {
      const int64_t ahead = movers.id[i + 16];
      __builtin_prefetch(row_start + ahead, 1);
      for (int t = 0; t < resize.n_per_id; t++)
        __builtin_prefetch(resize.per_id[t].target + ahead * resize.per_id[t].item, 1);
    }
    row_start[movers.id[i]] = I(start ? start[i] : -1);
    for (int t = 0; t < resize.n_per_id; t++) {
      const Fill& fill = resize.per_id[t];
      __builtin_memcpy(fill.target + movers.id[i] * fill.item, &fill.bits, size_t(fill.item));
    }
  }
  if (resize.call == INSERT) return;
  const int64_t* left = movers.start;
  for (int k = 0; k < resize.table.n; k++)
    for (const int64_t* last = left + movers.count[k]; left < last; left++) resize.places->give(*left, k);
}

}  // namespace

Status find_movers(Movers& movers, uint8_t* moved, const Table& table, const Ids& ids, const uint8_t* mask,
                   Call call) {
  int64_t admitted = 0;
  for (int64_t i = 0; i < ids.count; i++) {
    if (uint64_t(ids[i]) >= uint64_t(table.rows)) return OUT_OF_RANGE;
    admitted += !mask || mask[i];
  }
  Buffer memory(Buffer::padded<int32_t>(Seen::slots(admitted)));
  if (!memory.ok()) return NO_MEMORY;
  Seen seen(memory.take<int32_t>(Seen::slots(admitted)), ids, admitted);
  const Pages pages(table.page);
  for (int k = 0; k < table.n; k++) movers.count[k] = 0;
  // At first `moved` holds 2 + the level for the first position of an id that moves, 1 for the others.
  for (int64_t i = 0; i < ids.count; i++) {
    if (i + 16 < ids.count && (!mask || mask[i + 16])) {
      __builtin_prefetch(table.start_address(ids[i + 16]));
      seen.fetch(ids[i + 16]);
    }
    moved[i] = 0;
    if (mask && !mask[i]) continue;
    const int64_t start = table.start(ids[i]);
    const int level = start < 0 ? -1 : table.page_level[pages.of(start)];
    if (!moves(call, level, table.n)) continue;
    const int k = level < 0 ? 0 : level;
    const bool first = seen.add(i);
    moved[i] = uint8_t(first ? 2 + k : 1);
    movers.count[k] += first;
  }
  movers.start = movers.id + movers.total(table.n);
  int64_t at[MAX_LEVELS], sum = 0;
  for (int k = 0; k < table.n; k++) {
    at[k] = sum;
    sum += movers.count[k];
  }
  for (int64_t i = 0; i < ids.count; i++) {
    if (moved[i] < 2) continue;
    const int64_t place = at[moved[i] - 2]++;
    movers.id[place] = ids[i];
    movers.start[place] = table.start(ids[i]);
    moved[i] = 1;
  }
  return OK;
}

Status check_room(const Resize& resize) {
  if (resize.call == FREE) return OK;
  const int n = resize.table.n;
  const int64_t *count = resize.movers.count, *free = resize.places->free;
  int64_t taken[MAX_LEVELS] = {}, pages = 0;
  for (int k = 0; k < n; k++)
    if (count[k]) taken[resize.enters(k)] += count[k];
  for (int k = 0; k < n; k++) {
    const int64_t per = resize.table.page / resize.table.sizes[k];
    if (taken[k] > free[k]) pages += (taken[k] - free[k] + per - 1) / per;
  }
  return pages > free[n] ? NO_ROOM : OK;
}

void take_rows(const Resize& resize, int64_t* start) {
  for (int k = 0; k < resize.table.n; k++)
    for (int64_t i = 0; i < resize.movers.count[k]; i++) *start++ = resize.places->take(resize.enters(k));
}

void settle_rows(const Resize& resize, const int64_t* start) {
  return resize.table.wide_start ? settle<int64_t>(resize, start) : settle<int32_t>(resize, start);
}

}  // namespace esapn
