// The lookup's gradients: of the rows, written or stepped by, and of the composed hops. Mirrors
// gpu/lookup_bwd.py. Inside the namespace of an instruction set.
//
//   g_x = sum of grad_out over the occurrences of x, in their order
//   row      M_k^T g_x
//   hops     dA_k = sum_x [e_x; 1] g_x^T        from the rows as they were
//
// Distinct rows in the order of their first occurrence, a tile at a time: gradients are read nearly
// in order. Within a tile by level, in blocks that stay in the first cache. Tasks are of a fixed
// number of rows, each with its own part of dA, added in order: threads do not change a bit.

constexpr int BACKWARD_TILE = 256;
constexpr int FETCHED = 4;              // occurrences of an id
constexpr int BLOCK_BYTES = 24 << 10;  // of summed gradients: most of the first cache

template <class A>
struct Backward {
  const Table& table;
  const Groups& groups;
  const char* grad;
  int grad_dtype;
  const char* storage;
  int dtype;
  int64_t stride;
  const int64_t* offset;
  const Projection<A>* down;  // [n - 1]
  const Step<A>& step;
  int64_t padding;  // this id has no gradient
  int block;        // rows

  static int64_t scratch_numel(int block, int64_t stride) { return (3 * block + 3) * stride; }

  // Rows [first, end); `part`: this task's dA, or null; scratch: scratch_numel numbers.
  void run(int64_t first, int64_t end, A* part, A* scratch) const {
    const int64_t item = itemsize(dtype);
    const bool plain = dtype == DTYPE_OF<A>;
    A* sums = scratch;
    A* found = sums + block * stride;
    A* rows = found + block * stride;
    A* zero = rows + block * stride;
    A* two = zero + stride;  // rows
    for (int64_t c = 0; c < stride; c++) zero[c] = 0;
    const A* g[BACKWARD_TILE];
    const A* e[BACKWARD_TILE];
    uint16_t order[BACKWARD_TILE];
    fetch(first, first + BACKWARD_TILE < end ? first + BACKWARD_TILE : end);
    for (int64_t t = first; t < end; t += BACKWARD_TILE) {
      const int size = int(end - t < BACKWARD_TILE ? end - t : BACKWARD_TILE);
      int64_t ahead = t + size;
      const int64_t ahead_end = ahead + BACKWARD_TILE < end ? ahead + BACKWARD_TILE : end;
      int32_t count[MAX_LEVELS], place[MAX_LEVELS], sum = 0;
      for (int k = 0; k < table.n; k++) count[k] = 0;
      for (int i = 0; i < size; i++) count[groups.level[t + i]]++;
      for (int k = 0; k < table.n; k++) {
        place[k] = sum;
        sum += count[k];
      }
      for (int i = 0; i < size; i++) order[place[groups.level[t + i]]++] = uint16_t(i);
      int at = 0;
      for (int k = 0; k < table.n; k++) {
        const int64_t d = table.sizes[k];
        const bool last = k == table.n - 1;
        for (const int behind = at + count[k]; at < behind;) {
          const int B = behind - at < block ? behind - at : block;
          const uint16_t* of = order + at;
          for (int r = 0; r < B; r++) {
            const int64_t u = t + of[r];
            g[r] = summed(u, sums + r * stride, zero);
            e[r] = row(u, rows + r * stride, item, d, plain, part && !last);
          }
          const A* x = found;
          if (!last) {
            if (part) {
              A* m = part + offset[k] * stride;
              outer(m, stride, e, g, B, stride, d);
              add_rows(m + d * stride, g, B, stride);
            }
            const Projection<A>& p = down[k];
            for (int r = 0; r < B; r += TILE_ROWS) {
              const int some = B - r < TILE_ROWS ? B - r : TILE_ROWS;
              project(p, g + r, some, found + r * p.columns(), p.columns());
              if (ahead < ahead_end) {
                const int64_t stop = ahead + some / 2 < ahead_end ? ahead + some / 2 : ahead_end;
                fetch(ahead, stop);
                ahead = stop;
              }
            }
          }
          for (int r = 0; r < B; r++) {
            const int64_t u = t + of[r];
            if (ahead < ahead_end) {
              fetch(ahead, ahead + 1);
              ahead++;
            }
            step(groups.start[u], groups.id[u], last ? g[r] : x + r * down[k].columns(), d, groups.place[u], two);
          }
          at += B;
        }
      }
    }
  }

 private:
  ESAPN_INLINE const A* row(int64_t u, A* memory, int64_t item, int64_t d, bool plain, bool needed) const {
    const char* from = storage + groups.start[u] * item;
    if (plain) return reinterpret_cast<const A*>(from);
    if (needed) widen(memory, from, dtype, d);
    return memory;
  }

  // Rows [first, end), their state and their gradients' first occurrences.
  ESAPN_INLINE void fetch(int64_t first, int64_t end) const {
    const int64_t D = table.dim(), item = itemsize(dtype), grad_item = itemsize(grad_dtype);
    for (int64_t u = first; u < end; u++) {
      const int64_t d = table.sizes[groups.level[u]];
      int32_t o = groups.head[u];
      for (int i = 0; i < FETCHED && o >= 0; i++, o = groups.next[o])
        prefetch(grad + o * D * grad_item, D * grad_item);
      prefetch(storage + groups.start[u] * item, d * item);
      step.fetch(groups.start[u], groups.id[u], d);
    }
  }

  // The gradient of a distinct row: where it occurs once its place in grad, else the sum in `memory`.
  ESAPN_INLINE const A* summed(int64_t u, A* memory, const A* zero) const {
    constexpr int W = LANES<A>;
    typedef Vec<A, W> V;
    const int64_t D = table.dim();
    if (groups.id[u] == padding) return zero;
    int32_t i = groups.head[u];
    const bool direct = grad_dtype == DTYPE_OF<A> && stride == D;
    if (direct) {
      const A* from = reinterpret_cast<const A*>(grad);
      if (groups.next[i] < 0) return from + i * D;
      int64_t c = 0;
      for (; c + 8 * W <= D; c += 8 * W) {
        V sum[8];
        ESAPN_UNROLL
        for (int v = 0; v < 8; v++) sum[v] = load<V>(from + i * D + c + v * W);
        // The first ones were fetched with the tile; the walk stays so far ahead.
        int32_t fetched = i;
        for (int f = 1; f < FETCHED && fetched >= 0; f++) fetched = groups.next[fetched];
        for (int32_t o = groups.next[i]; o >= 0; o = groups.next[o]) {
          if (fetched >= 0 && (fetched = groups.next[fetched]) >= 0)
            prefetch(from + fetched * D + c, 8 * W * int64_t(sizeof(A)));
          ESAPN_UNROLL
          for (int v = 0; v < 8; v++) sum[v] += load<V>(from + o * D + c + v * W);
        }
        ESAPN_UNROLL
        for (int v = 0; v < 8; v++) store(memory + c + v * W, sum[v]);
      }
      for (; c < D; c += W) {
        V sum = load<V>(from + i * D + c);
        for (int32_t o = groups.next[i]; o >= 0; o = groups.next[o]) sum += load<V>(from + o * D + c);
        store(memory + c, sum);
      }
      return memory;
    }
    const int64_t grad_item = itemsize(grad_dtype);
    widen(memory, grad + i * D * grad_item, grad_dtype, D);
    for (int64_t c = D; c < stride; c++) memory[c] = 0;
    for (int32_t o = groups.next[i]; o >= 0; o = groups.next[o]) {
      A part[64];
      for (int64_t c = 0; c < D; c += 64) {
        const int64_t width = D - c < 64 ? D - c : 64;
        widen(part, grad + (o * D + c) * grad_item, grad_dtype, width);
        for (int64_t j = 0; j < width; j++) memory[c + j] += part[j];
      }
    }
    return memory;
  }
};

// `grad_composed`: [K, D], or null where hops do not learn.
template <class A>
static int lookup_bwd(const Table& table, const Ids& ids, const void* grad, int grad_dtype, void* storage,
                      int dtype, const void* composed, void* grad_composed, const Update& update,
                      int64_t padding, int threads) {
  const int64_t D = table.dim(), stride = padded_width<A>(D);
  int64_t offset[MAX_LEVELS];
  operand_offsets(table, offset);
  const int64_t rows = offset[table.n - 1], numel = rows * stride;
  Buffer held(group_bytes(ids.count));
  if (!held.ok()) return NO_MEMORY;
  Groups groups;
  const Status status = group(groups, held, table, ids, update.rule == SPARSE ? padding : -1);
  if (status != OK) return status;

  // As many rows a task as dA has, at least: then its parts take no more than the gradient.
  int64_t task_rows = 16 * BACKWARD_TILE;
  while (task_rows < rows) task_rows *= 2;
  const int64_t tasks = (groups.count + task_rows - 1) / task_rows;
  const int64_t parts = grad_composed ? tasks : 0;
  int64_t turned = 0;
  Projection<A> down[MAX_LEVELS];
  for (int k = 0; k + 1 < table.n; k++) {
    down[k] = Projection<A>{nullptr, stride, stride, table.sizes[k]};
    turned += Buffer::padded<A>(down[k].numel());
  }
  Buffer memory(turned + (stride == D ? 0 : Buffer::padded<A>(numel)) + parts * Buffer::padded<A>(numel));
  if (!memory.ok()) return NO_MEMORY;
  const A* operand = pad_rows(static_cast<const A*>(composed), rows, D, stride == D ? nullptr : memory.take<A>(numel));
  for (int k = 0; k + 1 < table.n; k++) {
    down[k].m = operand + offset[k] * stride;
    down[k].turn(memory.take<A>(down[k].numel()));
  }
  A* part = parts ? memory.take<A>(parts * Buffer::padded<A>(numel) / int64_t(sizeof(A))) : nullptr;
  const int64_t part_stride = Buffer::padded<A>(numel) / int64_t(sizeof(A));
  int block = 48;
  while (block > TILE_ROWS && block * stride * int64_t(sizeof(A)) > BLOCK_BYTES) block -= TILE_ROWS;

  const int64_t scratch_numel =
      Buffer::padded<A>(Backward<A>::scratch_numel(block, stride)) / int64_t(sizeof(A));
  Buffer scratch(workers(tasks, threads) * scratch_numel * int64_t(sizeof(A)));
  if (!scratch.ok()) return NO_MEMORY;
  A* scratches = scratch.take<A>(0);
  // From here on nothing fails.
  tick(update);
  if (update.rule == COLLECT) list_rows(update.rows, groups);
  const Step<A> step(update, storage, dtype);
  const Backward<A> backward{table, groups, static_cast<const char*>(grad), grad_dtype,
                             static_cast<const char*>(storage), dtype, stride, offset, down, step,
                             update.rule == SPARSE ? -1 : padding, block};
  parallel(tasks, threads, [&](int64_t task, int64_t worker) {
    A* mine = parts ? part + task * part_stride : nullptr;
    if (mine) __builtin_memset(mine, 0, size_t(numel) * sizeof(A));
    const int64_t first = task * task_rows;
    const int64_t end = first + task_rows < groups.count ? first + task_rows : groups.count;
    backward.run(first, end, mine, scratches + worker * scratch_numel);
  });
  if (grad_composed) {
    A* total = static_cast<A*>(grad_composed);
    if (parts)
      copy_rows(total, D, part, stride, rows);
    else
      __builtin_memset(total, 0, size_t(rows * D) * sizeof(A));
    for (int64_t p = 1; p < parts; p++)
      for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < D; c++) total[r * D + c] += part[p * part_stride + r * stride + c];
  }
  return OK;
}
