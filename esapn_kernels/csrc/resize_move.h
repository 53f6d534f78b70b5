// Rows that move: e' = W_k e + b_k, up or down, or zeros, at their new places, and fresh state. Mirrors
// _move_kernel and _fill_rows_kernel of gpu/resize.py. Inside the namespace of an instruction set.
//
// On one thread: rows that move are a small part of a batch, places are handed out one after the other,
// and half of the rest is memory, which threads share.

constexpr int RESIZE_AHEAD = 2 * TILE_ROWS;  // rows that are fetched before their turn

ESAPN_INLINE void fetch_to_write(const char* to, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(to + b, 1, 2);
}

// `bytes` of the pattern: whole numbers of at most 8 bytes.
ESAPN_INLINE void fill_row(char* to, int64_t bytes, uint64_t bits) {
  typedef Vec<uint64_t, ESAPN_BYTES / 8> V;
  const V wide = V{} + bits;
  int64_t b = 0;
  for (; b + ESAPN_BYTES <= bytes; b += ESAPN_BYTES) store(to + b, wide);
  for (; b + 8 <= bytes; b += 8) store(to + b, bits);
  if (bytes & 4) {
    store(to + b, uint32_t(bits));
    b += 4;
  }
  if (bytes & 2) {
    store(to + b, uint16_t(bits));
    b += 2;
  }
  if (bytes & 1) store(to + b, uint8_t(bits));
}

template <class A>
struct Moving {
  const Resize& resize;
  const int64_t* new_start;
  A* wide;    // TILE_ROWS rows of the largest size
  A* result;  // and as many of its padded width
  A* pads;    // the largest hop, padded

  // The rows [first, end) leave level k by the hop at `hop`; null: they are zeros.
  void level(int k, int64_t first, int64_t end, const A* hop) const {
    const Table& table = resize.table;
    const int64_t item = itemsize(resize.dtype), next = table.sizes[resize.enters(k)];
    const int64_t d = hop ? table.sizes[k] : 0, stride = padded_width<A>(next);
    const bool plain = resize.dtype == DTYPE_OF<A>, direct = plain && stride == next;
    const A* m = hop ? pad_rows(hop, d + 1, next, pads) : nullptr;
    for (int64_t i = first; i < end && i < first + RESIZE_AHEAD; i++) fetch(i, d, next);
    for (int64_t at = first; at < end; at += TILE_ROWS) {
      const int rows = int(end - at < TILE_ROWS ? end - at : TILE_ROWS);
      const A* e[TILE_ROWS];
      A* y[TILE_ROWS];
      for (int r = 0; r < rows; r++) {
        if (at + r + RESIZE_AHEAD < end) fetch(at + r + RESIZE_AHEAD, d, next);
        char* to = resize.storage + new_start[at + r] * item;
        for (int s = 0; s < resize.n_states; s++) {
          const Fill& fill = resize.states[s];
          fill_row(fill.target + new_start[at + r] * fill.item, next * fill.item, fill.bits);
        }
        if (!hop) {
          fill_row(to, next * item, 0);
          continue;
        }
        const char* from = resize.storage + resize.movers.start[at + r] * item;
        if (!plain) widen(wide + r * d, from, resize.dtype, d);
        e[r] = plain ? reinterpret_cast<const A*>(from) : wide + r * d;
        y[r] = direct ? reinterpret_cast<A*>(to) : result + r * stride;
      }
      if (!hop) continue;
      affine<A, false>(rows, e, m, stride, m + d * stride, y, stride, d);
      if (direct) continue;
      for (int r = 0; r < rows; r++) narrow(resize.storage + new_start[at + r] * item, y[r], resize.dtype, next);
    }
  }

  ESAPN_INLINE void fetch(int64_t i, int64_t d, int64_t next) const {
    const int64_t item = itemsize(resize.dtype);
    prefetch(resize.storage + resize.movers.start[i] * item, d * item);
    fetch_to_write(resize.storage + new_start[i] * item, next * item);
    for (int s = 0; s < resize.n_states; s++) {
      const Fill& fill = resize.states[s];
      fetch_to_write(fill.target + new_start[i] * fill.item, next * fill.item);
    }
  }
};

// NO_MEMORY, NO_ROOM: nothing is changed.
template <class A>
static int move_rows(const Resize& resize) {
  const Table& table = resize.table;
  const int64_t total = resize.movers.total(table.n), D = table.dim(), stride = padded_width<A>(D);
  int64_t pads = 0;
  for (int k = 0; k < table.n; k++) {
    if (!resize.hops() || !resize.movers.count[k]) continue;
    const int64_t numel = (table.sizes[k] + 1) * padded_width<A>(table.sizes[resize.enters(k)]);
    if (numel > pads) pads = numel;
  }
  Buffer memory(Buffer::padded<int64_t>(total) + Buffer::padded<A>(TILE_ROWS * D) +
                Buffer::padded<A>(TILE_ROWS * stride) + Buffer::padded<A>(pads));
  if (!memory.ok()) return NO_MEMORY;
  if (check_room(resize) != OK) return NO_ROOM;
  if (resize.call == FREE) {
    settle_rows(resize, nullptr);
    return OK;
  }
  int64_t* new_start = memory.take<int64_t>(total);
  // All places are taken before any is given back: new rows are disjoint from all old ones.
  take_rows(resize, new_start);
  A* wide = memory.take<A>(TILE_ROWS * D);
  A* result = memory.take<A>(TILE_ROWS * stride);
  const Moving<A> moving{resize, new_start, wide, result, memory.take<A>(pads)};
  const A* hop = resize.hops() ? static_cast<const A*>(resize.chain) : nullptr;
  if (resize.call == DEMOTE)
    for (int k = 1; k < table.n; k++) hop += (table.sizes[k] + 1) * table.sizes[k - 1];
  int64_t at = 0;
  for (int k = 0; k < table.n; k++) {
    if (resize.call == DEMOTE && k) hop -= (table.sizes[k] + 1) * table.sizes[k - 1];
    if (resize.movers.count[k]) moving.level(k, at, at + resize.movers.count[k], hop);
    at += resize.movers.count[k];
    if (resize.call == PROMOTE && k + 1 < table.n) hop += (table.sizes[k] + 1) * table.sizes[k + 1];
  }
  settle_rows(resize, new_start);
  return OK;
}
