// Rows that change their size: which ones a call moves, and the places that they take and give. Mirrors
// _claim_kernel and _scan_kernel of gpu/resize.py; resize_move.h is the rest.
#pragma once
#include "parallel.h"
#include "places.h"

namespace esapn {

enum Call : int { PROMOTE, INSERT, FREE, DEMOTE };

// The distinct rows that a call moves, by the level that they leave and then in the order of ids.
struct Movers {
  int64_t* count;  // [n]; rows that are inserted leave none, and are counted as of level 0
  int64_t* id;
  int64_t* start;  // of the row as it is, -1: the id has none

  ESAPN_INLINE int64_t total(int n) const {
    int64_t sum = 0;
    for (int k = 0; k < n; k++) sum += count[k];
    return sum;
  }
};

// A tensor whose rows (or the number of an id) start afresh: `bits` again and again, `item` bytes a number.
struct Fill {
  char* target;
  int64_t item;
  uint64_t bits;
};

// Everything that a call works on; row_start and page_level of the table are brought up to date.
struct Resize {
  Call call;
  int target;  // INSERT: the level of the new rows
  Table table;
  Movers movers;
  Places* places;
  int64_t* moves;  // calls so far
  char* storage;
  int dtype;
  const void* chain;  // DEMOTE: down hops, the last level's first; else the hops; in the dtype of the sums
  const Fill* states;
  int n_states;
  const Fill* per_id;
  int n_per_id;

  // The level of the rows that take places when rows of level k move.
  ESAPN_INLINE int enters(int k) const { return hops() ? k + (call == PROMOTE ? 1 : -1) : target; }

  // Whether rows keep their numbers, carried to another level.
  ESAPN_INLINE bool hops() const { return call == PROMOTE || call == DEMOTE; }
};

// Writes the movers, into memory for n + 2 ids.count numbers, and where ids name one of them: `moved`,
// by position. OUT_OF_RANGE: an id outside the table.
Status find_movers(Movers& movers, uint8_t* moved, const Table& table, const Ids& ids, const uint8_t* mask,
                   Call call);

// NO_ROOM: there are too few free places and pages.
Status check_room(const Resize& resize);

// Takes a place for every mover.
void take_rows(const Resize& resize, int64_t* start);

// The movers' rows begin at `start` from now on (null: they have none), their numbers per id are fresh,
// the places that they left are free, and the call is counted.
void settle_rows(const Resize& resize, const int64_t* start);

}  // namespace esapn
