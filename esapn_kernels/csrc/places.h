// Which places of an arena are taken: a bit for each. Rows take the lowest place of their level's lowest
// page that has one free, else a place of the lowest free page; a page whose last row leaves is free.
// So where rows go follows from where rows lie. See storage/taken.py.
#pragma once
#include "table.h"

namespace esapn {

constexpr int8_t FREE_PAGE = -1, FULL = -2;

struct Places {
  uint64_t* taken;  // [pages, words]
  int32_t* used;    // [pages] rows in it
  int8_t* vacant;   // [pages] its level while it has a free place, FREE_PAGE or FULL
  int64_t* free;    // [n + 1] free places of every level, then free pages
  int64_t* lowest;  // [n + 1] no page before this one has such a place, or is free
  int64_t words;    // of 64 places of the smallest size

  // The table whose rows lie here; its locations are brought up to date.
  Table table;

  // Derives all of it from where the rows lie, and pages without rows lose their level. NO_ROOM: two
  // rows lie in one place, or a row in no page.
  Status find();

  // The lowest place of a level; there is one.
  int64_t take(int level);

  // The row at `start` has gone.
  void give(int64_t start, int level);

  // The page from which `take` would take; past all pages: from a free one.
  int64_t next_page(int level) { return first(level, lowest[level]); }

 private:
  int8_t& level_of(int64_t page) const { return const_cast<int8_t*>(table.page_level)[page]; }
  int64_t pages() const { return table.capacity / table.page; }
  int64_t first(int kind, int64_t& from);
  template <class I>
  Status find_taken();
};

// A tensor whose rows move.
struct Moved {
  char* target;
  int64_t item;
};

// Rows of the ids [first, end) go to a lower page of their level, where it has a free place, one after
// the other, with what goes with them. Writes where each was and is, `from` and `to`; returns how many.
int64_t lower_rows(Places& places, int64_t first, int64_t end, const Moved* moved, int n_moved, int64_t* from,
                   int64_t* to);

}  // namespace esapn
