// Rows stepped by gradients that lookups collected, or these summed by id (COLLECT). Mirrors
// gpu/row_step.py. Inside the namespace of an instruction set.
//
//   g_x = sum of the gradients of x, in their order
//
// A task is a fixed number of rows, in the order in which ids name them first: threads do not change
// a bit.

constexpr int STEP_TASK = 4096;  // rows
constexpr int STEP_AHEAD = 16;

// Of every id: `level` that its row has, and `place` where its gradient begins in `values`, numbers of
// the dtype of the sums. OUT_OF_RANGE: a row has another level by now.
template <class A>
static int step_rows(const Table& table, const Ids& ids, const int8_t* level, const int64_t* place,
                     const void* values, void* storage, int dtype, const Update& update, int threads) {
  Buffer held(group_bytes(ids.count));
  if (!held.ok()) return NO_MEMORY;
  Groups groups;
  const Status status = group(groups, held, table, ids, -1);
  if (status != OK) return status;
  bool same = true;
  for (int64_t u = 0; u < groups.count; u++)
    for (int32_t o = groups.head[u]; o >= 0; o = groups.next[o]) same &= level[o] == int8_t(groups.level[u]);
  if (!same) return OUT_OF_RANGE;
  const A* from = static_cast<const A*>(values);
  const int64_t widest = Buffer::padded<A>(table.dim()) / int64_t(sizeof(A));
  const int64_t tasks = (groups.count + STEP_TASK - 1) / STEP_TASK;
  Buffer scratch(workers(tasks, threads) * 3 * widest * int64_t(sizeof(A)));
  if (!scratch.ok()) return NO_MEMORY;
  A* scratches = scratch.take<A>(0);
  // From here on nothing fails.
  tick(update);
  if (update.rule == COLLECT) list_rows(update.rows, groups);
  const Step<A> step(update, storage, dtype);
  parallel(tasks, threads, [&](int64_t task, int64_t worker) {
    A* sum = scratches + worker * 3 * widest;
    const int64_t end = (task + 1) * STEP_TASK < groups.count ? (task + 1) * STEP_TASK : groups.count;
    for (int64_t u = task * STEP_TASK; u < end; u++) {
      if (u + STEP_AHEAD < end) {
        const int64_t ahead = u + STEP_AHEAD, d = table.sizes[groups.level[ahead]];
        prefetch(from + place[groups.head[ahead]], d * int64_t(sizeof(A)));
        if (update.rule != COLLECT)
          prefetch(static_cast<char*>(storage) + groups.start[ahead] * itemsize(dtype), d * itemsize(dtype));
        step.fetch(groups.start[ahead], groups.id[ahead], d);
      }
      const int64_t d = table.sizes[groups.level[u]];
      int32_t o = groups.head[u];
      const A* g = from + place[o];
      if (groups.next[o] >= 0) {
        __builtin_memcpy(sum, g, size_t(d) * sizeof(A));
        for (o = groups.next[o]; o >= 0; o = groups.next[o])
          for (int64_t j = 0; j < d; j++) sum[j] += from[place[o] + j];
        g = sum;
      }
      step(groups.start[u], groups.id[u], g, d, groups.place[u], sum + widest);
    }
  });
  return OK;
}
