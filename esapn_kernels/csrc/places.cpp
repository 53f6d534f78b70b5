#include "places.h"

#include <string.h>

namespace esapn {

int64_t Places::first(int kind, int64_t& from) {
  const void* found = memchr(vacant + from, uint8_t(kind), size_t(pages() - from));
  return from = found ? static_cast<const int8_t*>(found) - vacant : pages();
}

// Without a division for each row, which would be most of its time: of offsets and sizes below 2^16 the
// quotient is the upper half of a product with ceil(2^32 / size).
template <class I>
Status Places::find_taken() {
  const Pages page_of(table.page);
  const I* row_start = static_cast<const I*>(table.row_start);
  uint64_t inverse[MAX_LEVELS];
  for (int k = 0; k < table.n; k++)
    inverse[k] = ((uint64_t(1) << 32) + uint64_t(table.sizes[k]) - 1) / uint64_t(table.sizes[k]);
  const bool small = table.page <= int64_t(1) << 16;
  for (int64_t id = 0; id < table.rows; id++) {
    const int64_t start = row_start[id];
    if (start < 0) continue;
    const int64_t page = page_of.of(start);
    if (page >= pages()) return NO_ROOM;
    const int level = table.page_level[page];
    if (level < 0 || level >= table.n) return NO_ROOM;
    const uint64_t offset = uint64_t(start - page * table.page);
    const uint64_t place = small ? offset * inverse[level] >> 32 : offset / uint64_t(table.sizes[level]);
    uint64_t& word = taken[page * words + int64_t(place / 64)];
    const uint64_t bit = uint64_t(1) << (place % 64);
    if (word & bit) return NO_ROOM;
    word |= bit;
    used[page]++;
  }
  return OK;
}

Status Places::find() {
  const int n = table.n;
  if (pages()) {  // else there is no memory
    memset(taken, 0, size_t(pages() * words) * sizeof(*taken));
    memset(used, 0, size_t(pages()) * sizeof(*used));
  }
  const Status status = table.wide_start ? find_taken<int64_t>() : find_taken<int32_t>();
  if (status != OK) return status;
  memset(free, 0, size_t(n + 1) * sizeof(*free));
  memset(lowest, 0, size_t(n + 1) * sizeof(*lowest));
  for (int64_t page = 0; page < pages(); page++) {
    if (!used[page]) level_of(page) = FREE_PAGE;
    const int level = table.page_level[page];
    const int64_t left = level < 0 ? 1 : table.page / table.sizes[level] - used[page];
    free[level < 0 ? n : level] += left;
    vacant[page] = left ? int8_t(level) : FULL;
  }
  return OK;
}

int64_t Places::take(int level) {
  const int64_t d = table.sizes[level], per = table.page / d;
  int64_t page;
  if (free[level]) {
    page = next_page(level);
  } else {
    page = first(FREE_PAGE, lowest[table.n]);
    level_of(page) = vacant[page] = int8_t(level);
    free[table.n]--;
    free[level] = per;
    if (page < lowest[level]) lowest[level] = page;
  }
  uint64_t* word = taken + page * words;
  while (!~*word) word++;
  const int bit = __builtin_ctzll(~*word);
  *word |= uint64_t(1) << bit;
  free[level]--;
  if (++used[page] == per) vacant[page] = FULL;
  return page * table.page + ((word - taken - page * words) * 64 + bit) * d;
}

void Places::give(int64_t start, int level) {
  const int64_t d = table.sizes[level], per = table.page / d, page = Pages(table.page).of(start);
  const int64_t place = (start - page * table.page) / d;
  taken[page * words + place / 64] &= ~(uint64_t(1) << (place % 64));
  free[level]++;
  int kind = level;
  if (!--used[page]) {
    level_of(page) = FREE_PAGE;
    free[level] -= per;
    free[table.n]++;
    kind = table.n;
  }
  vacant[page] = table.page_level[page];
  if (page < lowest[kind]) lowest[kind] = page;
}

int64_t lower_rows(Places& places, int64_t first, int64_t end, const Moved* moved, int n_moved, int64_t* from,
                   int64_t* to) {
  const Table& table = places.table;
  const Pages page_of(table.page);
  int64_t count = 0;
  for (int64_t id = first; id < end; id++) {
    const int64_t start = table.start(id);
    if (start < 0) continue;
    const int64_t page = page_of.of(start);
    const int level = table.page_level[page];
    if (!places.free[level] || places.next_page(level) >= page) continue;
    const int64_t lower = places.take(level), d = table.sizes[level];
    for (int t = 0; t < n_moved; t++) {
      const int64_t item = moved[t].item;
      memcpy(moved[t].target + lower * item, moved[t].target + start * item, size_t(d * item));
    }
    void* entry = const_cast<void*>(table.start_address(id));
    if (table.wide_start) *static_cast<int64_t*>(entry) = lower;
    else *static_cast<int32_t*>(entry) = int32_t(lower);
    places.give(start, level);
    from[count] = start;
    to[count++] = lower;
  }
  return count;
}

}  // namespace esapn
