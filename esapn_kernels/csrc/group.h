// Equal ids of a batch, put together without a sort. Mirrors what gpu/segments.py does by one.
#pragma once
#include "parallel.h"
#include "table.h"

namespace esapn {

// The distinct ids in the order of their first occurrence; the occurrences of each as a list.
struct Groups {
  int64_t count = 0;     // distinct ids
  int64_t elements = 0;  // of their rows
  int32_t* head;         // [count] position of the first occurrence
  int32_t* next;         // [ids] the next occurrence of the same id, -1: the last
  int64_t* id;           // [count]
  int64_t* start;        // [count] first element of the row
  int64_t* place;        // [count] elements of the rows before
  uint8_t* level;        // [count]
};

// Memory that `group` needs for so many ids.
int64_t group_bytes(int64_t ids);

// OUT_OF_RANGE: an id outside the table, or without a row. Ids equal to `skipped` are left out.
Status group(Groups& groups, Buffer& memory, const Table& table, const Ids& ids, int64_t skipped);

// OUT_OF_RANGE: an id outside [0, rows).
Status check_ids(const Ids& ids, int64_t rows);

}  // namespace esapn
