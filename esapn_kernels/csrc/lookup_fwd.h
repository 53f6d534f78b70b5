// The lookup: y(x) = M_k e + c_k. Mirrors gpu/lookup_fwd.py. Inside the namespace of an instruction
// set.
//
// A tile of ids at a time: located, put in order by level, and multiplied six rows at a time. While
// a tile is multiplied the rows of the next one are fetched, in step with the work.

constexpr int FORWARD_TILE = 256;
constexpr int64_t FORWARD_TASK = 2048;  // ids where several threads share them, a multiple of the tile

// The ids of a tile: where their rows begin, and their positions by level.
struct Located {
  int64_t start[FORWARD_TILE];
  uint8_t level[FORWARD_TILE];
  uint16_t order[FORWARD_TILE];
  int32_t count[MAX_LEVELS];
  int size;
};

// Ids [first, end), a tile of them. False: an id without a row.
static bool locate(Located& tile, const Table& table, const Pages& pages, const Ids& ids, int64_t first,
                   int64_t end) {
  tile.size = int(end - first < FORWARD_TILE ? (first < end ? end - first : 0) : FORWARD_TILE);
  for (int k = 0; k < table.n; k++) tile.count[k] = 0;
  for (int i = 0; i < tile.size; i++) {
    if (first + i + 32 < end) __builtin_prefetch(table.start_address(ids[first + i + 32]));
    const int64_t start = table.start(ids[first + i]);
    if (start < 0 || start >= table.capacity) return false;
    const int level = table.checked(table.page_level[pages.of(start)], start);
    if (level < 0) return false;
    tile.start[i] = start;
    tile.level[i] = uint8_t(level);
    tile.count[level]++;
  }
  int32_t at[MAX_LEVELS], sum = 0;
  for (int k = 0; k < table.n; k++) {
    at[k] = sum;
    sum += tile.count[k];
  }
  for (int i = 0; i < tile.size; i++) tile.order[at[tile.level[i]]++] = uint16_t(i);
  return true;
}

// Fetches what the next tile reads in step with the work on this one: rows at a time, for the
// addresses of many pages are looked up side by side.
struct Ahead {
  const char* storage;
  int64_t item;
  const int64_t* sizes;
  const Located* next;
  int64_t rate = 0, credit = 0;
  int at = 0;

  // `total`: the work on the present tile, in the unit of `step`.
  ESAPN_INLINE void over(int64_t total) { rate = total ? (int64_t(next->size) << 16) / total + 1 : 0; }
  ESAPN_INLINE void row() {
    prefetch(storage + next->start[at] * item, sizes[next->level[at]] * item);
    at++;
  }
  ESAPN_INLINE void step(int64_t work) {
    for (credit += work * rate; credit >= 65536; credit -= 65536)
      if (at < next->size) row();
  }
};

template <class A>
struct Forward {
  const Table& table;
  const Pages pages;
  const Ids& ids;
  const char* storage;
  int dtype;
  const A* composed;  // width `stride`, a multiple of the lanes
  int64_t stride;
  const int64_t* offset;  // first row of every level's block
  char* out;
  int out_dtype;

  // ids [first, end). scratch: 2 TILE_ROWS rows of `stride`.
  template <bool STREAM>
  bool run(int64_t first, int64_t end, A* scratch) const {
    const int64_t D = table.dim(), item = itemsize(dtype), out_row = D * itemsize(out_dtype);
    const bool plain = dtype == DTYPE_OF<A>, direct = out_dtype == DTYPE_OF<A> && D == stride;
    A* wide = scratch;
    A* result = scratch + TILE_ROWS * stride;
    Located two[2];
    if (!locate(two[0], table, pages, ids, first, end)) return false;
    Ahead begin{storage, item, table.sizes, &two[0]};
    while (begin.at < two[0].size) begin.row();
    int which = 0;
    for (int64_t t = first; t < end; t += FORWARD_TILE, which ^= 1) {
      const Located& tile = two[which];
      if (!locate(two[which ^ 1], table, pages, ids, t + FORWARD_TILE, end)) return false;
      int64_t total = 0;
      for (int k = 0; k < table.n; k++) total += tile.count[k] * work(k);
      Ahead ahead{storage, item, table.sizes, &two[which ^ 1]};
      ahead.over(total);
      char* y = out + t * out_row;
      int at = 0;
      for (int k = 0; k < table.n; k++) {
        const int behind = at + tile.count[k];
        const int64_t d = table.sizes[k];
        if (k == table.n - 1) {
          for (; at < behind; at++) {
            const int i = tile.order[at];
            ahead.step(work(k));
            copy<STREAM>(y + i * out_row, storage + tile.start[i] * item, wide, direct && plain);
          }
          break;
        }
        const A* m = composed + offset[k] * stride;
        while (at < behind) {
          const int rows = behind - at < TILE_ROWS ? behind - at : TILE_ROWS;
          const A* e[TILE_ROWS];
          A* z[TILE_ROWS];
          for (int r = 0; r < rows; r++) {
            const int i = tile.order[at + r];
            const char* row = storage + tile.start[i] * item;
            if (plain) {
              e[r] = reinterpret_cast<const A*>(row);
            } else {
              widen(wide + r * stride, row, dtype, d);
              e[r] = wide + r * stride;
            }
            z[r] = direct ? reinterpret_cast<A*>(y + i * out_row) : result + r * stride;
          }
          ahead.step(rows * work(k));
          if (direct)
            affine<A, STREAM>(rows, e, m, stride, m + d * stride, z, stride, d);
          else
            affine<A, false>(rows, e, m, stride, m + d * stride, z, stride, d);
          if (!direct)
            for (int r = 0; r < rows; r++) narrow(y + tile.order[at + r] * out_row, z[r], out_dtype, D);
          at += rows;
        }
      }
    }
    return true;
  }

  // What a row of level k costs, about, in half vectors.
  ESAPN_INLINE int64_t work(int k) const {
    return k == table.n - 1 ? 16 : 10 + 5 * table.sizes[k] / 2;
  }

  template <bool STREAM>
  ESAPN_INLINE void copy_row(A* to, const A* from) const {
    constexpr int W = LANES<A>;
    for (int64_t at = 0; at < stride; at += W) {
      if (STREAM)
        stream(to + at, load<Vec<A, W>>(from + at));
      else
        store(to + at, load<Vec<A, W>>(from + at));
    }
  }

  // A row of the last level, which is its output.
  template <bool STREAM>
  ESAPN_INLINE void copy(char* y, const char* row, A* wide, bool direct) const {
    const int64_t D = table.dim();
    if (direct) {
      copy_row<STREAM>(reinterpret_cast<A*>(y), reinterpret_cast<const A*>(row));
    } else if (dtype == out_dtype) {
      __builtin_memcpy(y, row, size_t(D * itemsize(dtype)));
    } else {
      widen(wide, row, dtype, D);
      narrow(y, wide, out_dtype, D);
    }
  }
};

template <class A>
static int lookup_fwd(const Table& table, const Ids& ids, const void* storage, int dtype,
                      const void* composed, void* out, int out_dtype, int threads) {
  const int64_t D = table.dim(), stride = padded_width<A>(D);
  int64_t offset[MAX_LEVELS];
  operand_offsets(table, offset);
  const int64_t blocks = offset[table.n - 1];
  const int64_t bytes = ids.count * D * itemsize(out_dtype);
  // Streamed, an output is in memory when it is read next: only where no cache would hold it.
  const bool streams = bytes >= LARGE && D == stride &&
                       reinterpret_cast<uintptr_t>(out) % ESAPN_BYTES == 0;
  if (bytes >= LARGE) advise_large_pages(out, bytes);
  Buffer pads(stride == D ? 0 : Buffer::padded<A>(blocks * stride));
  if (!pads.ok()) return NO_MEMORY;
  const A* operand =
      pad_rows(static_cast<const A*>(composed), blocks, D, stride == D ? nullptr : pads.take<A>(blocks * stride));
  const Forward<A> forward{table, Pages(table.page), ids, static_cast<const char*>(storage), dtype,
                           operand, stride, offset, static_cast<char*>(out), out_dtype};
  const int64_t task_ids = threads > 1 || ids.count < FORWARD_TASK ? FORWARD_TASK : ids.count;
  const int64_t tasks = (ids.count + task_ids - 1) / task_ids;
  const int64_t scratch_numel = TILE_ROWS * 2 * stride;
  Buffer scratch(workers(tasks, threads) * Buffer::padded<A>(scratch_numel));
  if (!scratch.ok()) return NO_MEMORY;
  A* memory = scratch.take<A>(0);
  int status = OK;
  parallel(tasks, threads, [&](int64_t task, int64_t worker) {
    const int64_t first = task * task_ids;
    const int64_t end = first + task_ids < ids.count ? first + task_ids : ids.count;
    A* mine = memory + worker * (Buffer::padded<A>(scratch_numel) / int64_t(sizeof(A)));
    const bool good =
        streams ? forward.template run<true>(first, end, mine) : forward.template run<false>(first, end, mine);
    if (streams) stream_fence();
    if (!good) __atomic_store_n(&status, int(OUT_OF_RANGE), __ATOMIC_RELAXED);
  });
  return status;
}
