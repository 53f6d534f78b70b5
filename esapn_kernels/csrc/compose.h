// The chain and its reverse (ops/compose.py holds the recursions). Mirrors gpu/compose.py. Inside the
// namespace of an instruction set.
//
// With `tails` the chain holds [B_k | b_k]^T, [d_k + 1, d_{k+1} - d_k], of the hops W_k = [g I; B_k] and
// b_k = [0; b_k]: the first d_k of d_{k+1} columns are `kept`, a multiple of the row, and take no product.
// A chain of 16 bits is widened first, and its tails to whole hops with a `g` of 16 bits; products with its
// zeros keep the bits of a chain that is whole.

// to_r += factor * from_r, rows of one stride.
template <class A>
static void add_multiple(A* __restrict to, const A* __restrict from, A factor, int64_t numel) {
  for (int64_t c = 0; c < numel; c++) to[c] += factor * from[c];
}

template <class A>
ESAPN_INLINE A gain(int64_t d, int64_t next) {
  return A(root(double(next) / double(d)));
}

static int64_t hops_numel(const int64_t* sizes, int n) {
  int64_t numel = 0;
  for (int k = 0; k + 1 < n; k++) numel += (sizes[k] + 1) * sizes[k + 1];
  return numel;
}

// Whole hops as A, from hops or tails of 16 bits.
template <class A>
static void widen_hops(A* to, const int64_t* sizes, int n, bool tails, const void* memory, int dtype) {
  const uint16_t* from = static_cast<const uint16_t*>(memory);
  if (!tails) return widen(to, from, dtype, hops_numel(sizes, n));
  for (int k = 0; k + 1 < n; k++) {
    const int64_t d = sizes[k], next = sizes[k + 1];
    A g[8] = {gain<A>(d, next)};  // as many as these functions may take at a time
    uint16_t rounded[8];
    narrow(rounded, g, dtype, 1);
    widen(g, rounded, dtype, 1);
    for (int64_t r = 0; r <= d; r++, to += next, from += next - d) {
      for (int64_t c = 0; c < d; c++) to[c] = c == r ? g[0] : A(0);
      widen(to + d, from, dtype, next - d);
    }
  }
}

// The reverse, of gradients.
template <class A>
static void narrow_hops(void* memory, const int64_t* sizes, int n, bool tails, const A* from, int dtype) {
  uint16_t* to = static_cast<uint16_t*>(memory);
  if (!tails) return narrow(to, from, dtype, hops_numel(sizes, n));
  for (int k = 0; k + 1 < n; k++) {
    const int64_t d = sizes[k], next = sizes[k + 1];
    for (int64_t r = 0; r <= d; r++, to += next - d, from += next) narrow(to, from + d, dtype, next - d);
  }
}

// [K, D] from the packed hops: A_k = T_k A'_{k+1} + [0; c_{k+1}], k = n - 2 ... 0.
template <class A>
static int compose(const int64_t* sizes, int n, bool tails, const void* chain_memory, int dtype,
                   void* composed_memory) {
  if (itemsize(dtype) == 2) {
    const int64_t whole = hops_numel(sizes, n);
    Buffer widened(Buffer::padded<A>(whole));
    if (!widened.ok()) return NO_MEMORY;
    A* hops = widened.take<A>(whole);
    widen_hops(hops, sizes, n, tails, chain_memory, dtype);
    return compose<A>(sizes, n, false, hops, DTYPE_OF<A>, composed_memory);
  }
  const A* chain = static_cast<const A*>(chain_memory);
  A* composed = static_cast<A*>(composed_memory);
  const int64_t D = sizes[n - 1], stride = padded_width<A>(D);
  int64_t rows = 0, hop = 0;
  for (int k = 0; k + 1 < n; k++) {
    rows += sizes[k] + 1;
    hop += (sizes[k] + 1) * (sizes[k + 1] - (tails ? sizes[k] : 0));
  }
  const bool padded = stride != D;
  Buffer memory(Buffer::padded<A>(stride) + (padded ? Buffer::padded<A>(rows * stride) : 0));
  if (!memory.ok()) return NO_MEMORY;
  A* zero = memory.take<A>(stride);
  for (int64_t c = 0; c < stride; c++) zero[c] = 0;
  A* work = padded ? memory.take<A>(rows * stride) : composed;
  int64_t block = rows;
  for (int k = n - 2; k >= 0; k--) {
    const int64_t d = sizes[k], next = sizes[k + 1], kept = tails ? d : 0, width = next - kept;
    hop -= (d + 1) * width;
    block -= d + 1;
    const A* t = chain + hop;
    A* y = work + block * stride;
    if (k == n - 2) {
      if (!tails) copy_rows(y, stride, t, D, d + 1);
      for (int64_t r = 0; r < (tails ? d + 1 : 0); r++) {
        for (int64_t c = 0; c < d; c++) y[r * stride + c] = c == r ? gain<A>(d, next) : A(0);
        copy_rows(y + r * stride + d, stride - d, t + r * width, width, 1);
      }
      continue;
    }
    const A* m = y + (d + 1) * stride;
    for (int64_t r = 0; r < d; r += TILE_ROWS) {
      const int count = int(d - r < TILE_ROWS ? d - r : TILE_ROWS);
      const A* e[TILE_ROWS];
      A* z[TILE_ROWS];
      for (int i = 0; i < count; i++) {
        e[i] = t + (r + i) * width;
        z[i] = y + (r + i) * stride;
      }
      affine<A, false>(count, e, m + kept * stride, stride, zero, z, stride, width);
    }
    if (tails) add_multiple(y, m, gain<A>(d, next), d * stride);
    const A* bias = t + d * width;
    A* last = y + d * stride;
    affine<A, false>(1, &bias, m + kept * stride, stride, m + next * stride, &last, stride, width);
  }
  if (padded) copy_rows(composed, D, work, stride, rows);
  return OK;
}

// The gradient of the packed hops from that of `composed`, G_0 = dA_0:
//   dT_k = G_k A'_{k+1}^T,   G_{k+1} = dA_{k+1} + T_k^{+T} G_k
// Rows of zeros take part in no product: zero times what is not finite is not a number.
template <class A>
static int compose_bwd(const int64_t* sizes, int n, bool tails, const void* grad_memory,
                       const void* chain_memory, int dtype, const void* composed_memory,
                       void* grad_chain_memory) {
  if (itemsize(dtype) == 2) {
    const int64_t whole = hops_numel(sizes, n);
    Buffer widened(2 * Buffer::padded<A>(whole));
    if (!widened.ok()) return NO_MEMORY;
    A* hops = widened.take<A>(whole);
    A* found = widened.take<A>(whole);
    widen_hops(hops, sizes, n, tails, chain_memory, dtype);
    const int status =
        compose_bwd<A>(sizes, n, false, grad_memory, hops, DTYPE_OF<A>, composed_memory, found);
    if (status == OK) narrow_hops(grad_chain_memory, sizes, n, tails, found, dtype);
    return status;
  }
  const A* chain = static_cast<const A*>(chain_memory);
  A* grad_chain = static_cast<A*>(grad_chain_memory);
  const int64_t D = sizes[n - 1], stride = padded_width<A>(D);
  int64_t rows = 0, largest = 0;
  for (int k = 0; k + 1 < n; k++) {
    rows += sizes[k] + 1;
    if (sizes[k] > largest) largest = sizes[k];
  }
  const int64_t columns = (largest + LANES<A>) / LANES<A> * LANES<A>;
  Buffer memory(2 * Buffer::padded<A>(rows * stride) + Buffer::padded<A>(columns * stride) +
                Buffer::padded<A>(TILE_ROWS * columns) + 2 * Buffer::padded<const A*>(largest + 1));
  if (!memory.ok()) return NO_MEMORY;
  A* grad = memory.take<A>(rows * stride);
  copy_rows(grad, stride, static_cast<const A*>(grad_memory), D, rows);
  const A* composed = pad_rows(static_cast<const A*>(composed_memory), rows, D, memory.take<A>(rows * stride));
  A* turned = memory.take<A>(columns * stride);
  A* found = memory.take<A>(TILE_ROWS * columns);
  const A** e = memory.take<const A*>(largest + 1);
  const A** g = memory.take<const A*>(largest + 1);
  int64_t block = 0, hop = 0;
  for (int k = 0; k + 1 < n; k++) {
    const int64_t d = sizes[k], next = sizes[k + 1], kept = tails ? d : 0, width = next - kept;
    const A* G = grad + block * stride;
    const A* T = chain + hop;
    A* dT = grad_chain + hop;
    block += d + 1;
    hop += (d + 1) * width;
    if (k == n - 2) {
      copy_rows(dT, width, G + kept, stride, d + 1);
      break;
    }
    int used = 0;
    for (int64_t r = 0; r <= d; r++) {
      int different = 0;
      for (int64_t c = 0; c < stride; c++) different |= G[r * stride + c] != 0;
      if (!different) {
        for (int64_t j = 0; j < width; j++) dT[r * width + j] = 0;
        continue;
      }
      e[used] = T + r * width;
      g[used++] = G + r * stride;
    }
    Projection<A> down{composed + (block + kept) * stride, stride, stride, width};
    down.turn(turned);
    const int64_t apart = down.columns();
    for (int r = 0; r < used; r += TILE_ROWS) {
      const int count = used - r < TILE_ROWS ? used - r : TILE_ROWS;
      project(down, g + r, count, found, apart);
      for (int i = 0; i < count; i++)
        for (int64_t j = 0; j < width; j++) dT[(e[r + i] - T) + j] = found[i * apart + j];
    }
    A* H = grad + block * stride;
    if (tails) add_multiple(H, G, gain<A>(d, next), d * stride);
    outer(H + kept * stride, stride, e, g, used, stride, width);
    const A* last = G + d * stride;
    add_rows(H + next * stride, &last, 1, stride);
  }
  return OK;
}
