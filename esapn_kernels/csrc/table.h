// What every kernel is told: dtypes, where the rows lie (ops/layout.py: Layout), how hops are packed.
#pragma once
#include <stdint.h>

// What several instruction sets include must be inlined: of a function that stands in all of their
// objects the linker keeps one, which might be the one that this machine cannot run.
#define ESAPN_INLINE inline __attribute__((always_inline))

namespace esapn {

enum Dtype : int { F32, F64, BF16, F16 };

ESAPN_INLINE int64_t itemsize(int dtype) { return dtype == F64 ? 8 : dtype == F32 ? 4 : 2; }

constexpr int MAX_LEVELS = 128;  // page levels are int8

enum Status : int { OK = 0, OUT_OF_RANGE = 1, NO_MEMORY = 2, NO_ROOM = 3 };

// N rows of n sizes: row x begins at element row_start[x] and has sizes[page_level[row_start[x] / page]]
// elements. Nothing here owns memory.
struct Table {
  const void* row_start;  // int32 or int64, -1: the id has no row
  bool wide_start;
  const int8_t* page_level;
  int64_t rows, page;
  int64_t capacity;  // elements of the storage
  const int64_t* sizes;
  int n;

  ESAPN_INLINE int64_t dim() const { return sizes[n - 1]; }
  // The level of the row at `start`, which page_level gives; -1: there is no such row.
  ESAPN_INLINE int checked(int level, int64_t start) const {
    return level >= 0 && level < n && start + sizes[level] <= capacity ? level : -1;
  }
  ESAPN_INLINE int64_t start(int64_t id) const {
    return wide_start ? static_cast<const int64_t*>(row_start)[id] : static_cast<const int32_t*>(row_start)[id];
  }
  ESAPN_INLINE const void* start_address(int64_t id) const {
    return static_cast<const char*>(row_start) + id * (wide_start ? 8 : 4);
  }
};

// The page of an element by a shift where pages are a power of two, as all arenas have them.
struct Pages {
  int64_t page;
  int shift;
  ESAPN_INLINE explicit Pages(int64_t elements)
      : page(elements), shift((elements & (elements - 1)) ? -1 : __builtin_ctzll(uint64_t(elements))) {}
  ESAPN_INLINE int64_t of(int64_t start) const { return shift >= 0 ? start >> shift : start / page; }
};

struct Ids {
  const void* data;  // int32 or int64
  bool wide;
  int64_t count;

  ESAPN_INLINE int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

// What becomes of a row's gradient: ops/update.py's rules, or it is written.
enum Rule : int { WRITE, SPARSE, COLLECT, SGD, ADAGRAD, ROWWISE_ADAGRAD, ADAM, ROWWISE_ADAM };

// Gradients of distinct rows, one behind the other; ops/update.py.
struct CollectedRows {
  int64_t* id;     // [rows]
  int8_t* level;   // [rows]
  int64_t* place;  // [rows] first element in the values
  int64_t* count;  // [2]: rows, elements
};

// Rules with a clock, and with steps per id.
ESAPN_INLINE bool is_adam(int rule) { return rule == ADAM || rule == ROWWISE_ADAM; }

struct Update {
  int rule;
  void* target;           // WRITE: [capacity], SPARSE: values, dtype of the storage; COLLECT: values, of the sums
  int64_t* elements;      // SPARSE: the element of every value
  const double* numbers;  // [11], as rule_numbers gives them
  void *moment, *square;  // [capacity], dtype of the sums
  void* row_sums;         // [N], dtype of the sums: ROWWISE_ADAGRAD the sum, ROWWISE_ADAM the second moment
  int32_t* last_step;     // [N]: both Adams
  double* clock;          // [3], moved on to this step: both Adams
  bool shaped;            // the last four numbers are in use
  CollectedRows rows;     // COLLECT
};

}  // namespace esapn
