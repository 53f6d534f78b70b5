// The three products that all operators are made of, in tiles that stay in registers. Inside the
// namespace of an instruction set.
//
//   affine    y_r = c + sum_j e_r[j] m_j          rows carried to a larger size
//   outer     m_j += sum_r e_r[j] g_r             the gradient of the matrix
//   project   x_r[j] = m_j . g_r                  the gradient of the rows
//
// Sums run in one order, whatever tile a row is in: a row's result does not depend on its neighbours.
// Widths (of m, c, y, g) are multiples of the lanes; who calls pads them.

// Rows of a tile, and vectors across: their product of accumulators leaves room for the operands.
constexpr int TILE_ROWS = 6;
constexpr int TILE_VECTORS = ESAPN_REGISTERS == 32 ? 4 : 2;

template <class A>
ESAPN_INLINE int64_t padded_width(int64_t width) {
  return (width + LANES<A> - 1) / LANES<A> * LANES<A>;
}

// Rows of `width` numbers into rows of `to_width`: cut off, or with zeros behind.
template <class A>
static void copy_rows(A* to, int64_t to_width, const A* from, int64_t width, int64_t count) {
  const int64_t common = width < to_width ? width : to_width;
  for (int64_t r = 0; r < count; r++) {
    __builtin_memcpy(to + r * to_width, from + r * width, size_t(common) * sizeof(A));
    for (int64_t c = common; c < to_width; c++) to[r * to_width + c] = 0;
  }
}

// Rows of a multiple of the lanes; `memory` takes them where they have to be copied.
template <class A>
static const A* pad_rows(const A* rows, int64_t count, int64_t width, A* memory) {
  const int64_t stride = padded_width<A>(width);
  if (stride == width) return rows;
  copy_rows(memory, stride, rows, width, count);
  return memory;
}

// First row of every level's block in `composed`, and the number of rows.
static void operand_offsets(const Table& table, int64_t* offset) {
  offset[0] = 0;
  for (int k = 0; k + 1 < table.n; k++) offset[k + 1] = offset[k] + table.sizes[k] + 1;
}

template <class A, int R, int C, bool STREAM>
ESAPN_INLINE void affine_tile(const A* const* e, const A* m, int64_t stride, const A* c, A* const* y,
                              int64_t at, int64_t d) {
  constexpr int W = LANES<A>;
  typedef Vec<A, W> V;
  V sum[R][C];
  ESAPN_UNROLL
  for (int v = 0; v < C; v++) {
    const V begin = load<V>(c + at + v * W);
    ESAPN_UNROLL
    for (int r = 0; r < R; r++) sum[r][v] = begin;
  }
  for (int64_t j = 0; j < d; j++) {
    V row[C];
    ESAPN_UNROLL
    for (int v = 0; v < C; v++) row[v] = load<V>(m + j * stride + at + v * W);
    ESAPN_UNROLL
    for (int r = 0; r < R; r++) {
      const A factor = e[r][j];
      ESAPN_UNROLL
      for (int v = 0; v < C; v++) sum[r][v] += factor * row[v];
    }
  }
  ESAPN_UNROLL
  for (int r = 0; r < R; r++)
    ESAPN_UNROLL
    for (int v = 0; v < C; v++) {
      if (STREAM)
        stream(y[r] + at + v * W, sum[r][v]);
      else
        store(y[r] + at + v * W, sum[r][v]);
    }
}

template <class A, int R, bool STREAM>
static void affine_rows(const A* const* e, const A* m, int64_t stride, const A* c, A* const* y,
                        int64_t width, int64_t d) {
  constexpr int W = LANES<A>, C = TILE_VECTORS;
  int64_t at = 0;
  for (; at + C * W <= width; at += C * W) affine_tile<A, R, C, STREAM>(e, m, stride, c, y, at, d);
  if (C > 2 && at + 2 * W <= width) {
    affine_tile<A, R, 2, STREAM>(e, m, stride, c, y, at, d);
    at += 2 * W;
  }
  if (at < width) affine_tile<A, R, 1, STREAM>(e, m, stride, c, y, at, d);
}

// 1 to TILE_ROWS rows.
template <class A, bool STREAM>
static void affine(int rows, const A* const* e, const A* m, int64_t stride, const A* c, A* const* y,
                   int64_t width, int64_t d) {
  switch (rows) {
    case 1: return affine_rows<A, 1, STREAM>(e, m, stride, c, y, width, d);
    case 2: return affine_rows<A, 2, STREAM>(e, m, stride, c, y, width, d);
    case 3: return affine_rows<A, 3, STREAM>(e, m, stride, c, y, width, d);
    case 4: return affine_rows<A, 4, STREAM>(e, m, stride, c, y, width, d);
    case 5: return affine_rows<A, 5, STREAM>(e, m, stride, c, y, width, d);
    default: return affine_rows<A, 6, STREAM>(e, m, stride, c, y, width, d);
  }
}

template <class A, int J, int C>
ESAPN_INLINE void outer_tile(A* m, int64_t stride, const A* const* e, const A* const* g, int rows,
                             int64_t at, int64_t j) {
  constexpr int W = LANES<A>;
  typedef Vec<A, W> V;
  V sum[J][C];
  ESAPN_UNROLL
  for (int i = 0; i < J; i++)
    ESAPN_UNROLL
    for (int v = 0; v < C; v++) sum[i][v] = load<V>(m + (j + i) * stride + at + v * W);
  for (int r = 0; r < rows; r++) {
    V row[C];
    ESAPN_UNROLL
    for (int v = 0; v < C; v++) row[v] = load<V>(g[r] + at + v * W);
    ESAPN_UNROLL
    for (int i = 0; i < J; i++) {
      const A factor = e[r][j + i];
      ESAPN_UNROLL
      for (int v = 0; v < C; v++) sum[i][v] += factor * row[v];
    }
  }
  ESAPN_UNROLL
  for (int i = 0; i < J; i++)
    ESAPN_UNROLL
    for (int v = 0; v < C; v++) store(m + (j + i) * stride + at + v * W, sum[i][v]);
}

template <class A, int C>
static void outer_columns(A* m, int64_t stride, const A* const* e, const A* const* g, int rows,
                          int64_t at, int64_t d) {
  int64_t j = 0;
  for (; j + 6 <= d; j += 6) outer_tile<A, 6, C>(m, stride, e, g, rows, at, j);
  switch (d - j) {
    case 1: return outer_tile<A, 1, C>(m, stride, e, g, rows, at, j);
    case 2: return outer_tile<A, 2, C>(m, stride, e, g, rows, at, j);
    case 3: return outer_tile<A, 3, C>(m, stride, e, g, rows, at, j);
    case 4: return outer_tile<A, 4, C>(m, stride, e, g, rows, at, j);
    case 5: return outer_tile<A, 5, C>(m, stride, e, g, rows, at, j);
    default: return;
  }
}

template <class A>
static void outer(A* m, int64_t stride, const A* const* e, const A* const* g, int rows, int64_t width,
                  int64_t d) {
  constexpr int W = LANES<A>, C = TILE_VECTORS;
  int64_t at = 0;
  for (; at + C * W <= width; at += C * W) outer_columns<A, C>(m, stride, e, g, rows, at, d);
  for (; at < width; at += W) outer_columns<A, 1>(m, stride, e, g, rows, at, d);
}

// m += sum_r g_r
template <class A>
static void add_rows(A* m, const A* const* g, int rows, int64_t width) {
  constexpr int W = LANES<A>, C = 4;
  typedef Vec<A, W> V;
  int64_t at = 0;
  for (; at + C * W <= width; at += C * W) {
    V sum[C];
    ESAPN_UNROLL
    for (int v = 0; v < C; v++) sum[v] = load<V>(m + at + v * W);
    for (int r = 0; r < rows; r++)
      ESAPN_UNROLL
      for (int v = 0; v < C; v++) sum[v] += load<V>(g[r] + at + v * W);
    ESAPN_UNROLL
    for (int v = 0; v < C; v++) store(m + at + v * W, sum[v]);
  }
  for (; at < width; at += W) {
    V sum = load<V>(m + at);
    for (int r = 0; r < rows; r++) sum += load<V>(g[r] + at);
    store(m + at, sum);
  }
}

// The matrix as `project` reads it: for few columns as it is, else transposed, [width, lanes].
template <class A>
struct Projection {
  const A* m;
  int64_t stride, width, d;
  A* turned = nullptr;

  // Lanes that the columns of a row take; 0: by dot products.
  ESAPN_INLINE int lanes() const {
    constexpr int W = LANES<A>;
    if (d <= W / 4) return 0;
    return int(d <= HALF_LANES<A> ? HALF_LANES<A> : W);
  }
  // Numbers that `turned` and every row of the result take.
  ESAPN_INLINE int64_t columns() const {
    const int64_t by = lanes() ? lanes() : 1;
    return (d + by - 1) / by * by;
  }
  ESAPN_INLINE int64_t numel() const { return lanes() ? width * columns() : 0; }

  void turn(A* memory) {
    turned = memory;
    if (!lanes()) return;
    constexpr int W = LANES<A>;
    typedef Vec<A, W> V;
    const int64_t n = columns();
    for (int64_t j = 0; j < n; j += W)
      for (int64_t c = 0; c < width; c += W) {
        V block[W];
        for (int i = 0; i < W; i++) block[i] = j + i < d ? load<V>(m + (j + i) * stride + c) : V{};
        Transpose<V, W>::run(block);
        // The last block may be half as wide.
        for (int i = 0; i < W; i++) {
          if (j + W <= n)
            store(turned + (c + i) * n + j, block[i]);
          else
            __builtin_memcpy(turned + (c + i) * n + j, &block[i], size_t(n - j) * sizeof(A));
        }
      }
  }
};

template <class A, int L, int C, int R>
ESAPN_INLINE void project_tile(const A* turned, int64_t columns, int64_t width, const A* const* g, A* x,
                               int64_t x_stride, int64_t at) {
  typedef Vec<A, L> V;
  V sum[R][C];
  ESAPN_UNROLL
  for (int r = 0; r < R; r++)
    ESAPN_UNROLL
    for (int v = 0; v < C; v++) sum[r][v] = V{};
  for (int64_t c = 0; c < width; c++) {
    V row[C];
    ESAPN_UNROLL
    for (int v = 0; v < C; v++) row[v] = load<V>(turned + c * columns + at + v * L);
    ESAPN_UNROLL
    for (int r = 0; r < R; r++) {
      const A factor = g[r][c];
      ESAPN_UNROLL
      for (int v = 0; v < C; v++) sum[r][v] += factor * row[v];
    }
  }
  ESAPN_UNROLL
  for (int r = 0; r < R; r++)
    ESAPN_UNROLL
    for (int v = 0; v < C; v++) store(x + r * x_stride + at + v * L, sum[r][v]);
}

template <class A, int L, int R>
static void project_rows(const A* turned, int64_t columns, int64_t width, const A* const* g, A* x,
                         int64_t x_stride) {
  constexpr int C = TILE_VECTORS;
  int64_t at = 0;
  for (; at + C * L <= columns; at += C * L)
    project_tile<A, L, C, R>(turned, columns, width, g, x, x_stride, at);
  if (C > 2 && at + 2 * L <= columns) {
    project_tile<A, L, 2, R>(turned, columns, width, g, x, x_stride, at);
    at += 2 * L;
  }
  if (at < columns) project_tile<A, L, 1, R>(turned, columns, width, g, x, x_stride, at);
}

template <class A, int L>
static void project_lanes(const A* turned, int64_t columns, int64_t width, const A* const* g, int rows,
                          A* x, int64_t x_stride) {
  int r = 0;
  for (; r + 6 <= rows; r += 6)
    project_rows<A, L, 6>(turned, columns, width, g + r, x + r * x_stride, x_stride);
  for (; r + 2 <= rows; r += 2)
    project_rows<A, L, 2>(turned, columns, width, g + r, x + r * x_stride, x_stride);
  for (; r < rows; r++) project_rows<A, L, 1>(turned, columns, width, g + r, x + r * x_stride, x_stride);
}

// Of W vectors the sums over their lanes, as one vector: halves of two are added side by side.
// `v` holds sums of BLOCK lanes each, W / BLOCK of them a vector.
template <class V, int W, int BLOCK>
struct Fold {
  // The lane of two vectors, side by side, that becomes this one; the other half lies `half` behind.
  static constexpr int source(int lane) {
    const int half = BLOCK / 2, part = lane / half;
    return part * BLOCK + lane % half;
  }
  template <int... LANE>
  static ESAPN_INLINE V pair(V a, V b, std::integer_sequence<int, LANE...>) {
    return __builtin_shufflevector(a, b, source(LANE)...) +
           __builtin_shufflevector(a, b, (source(LANE) + BLOCK / 2)...);
  }
  static ESAPN_INLINE V run(V* v) {
    ESAPN_UNROLL
    for (int i = 0; i < BLOCK / 2; i++)
      v[i] = pair(v[2 * i], v[2 * i + 1], std::make_integer_sequence<int, W>{});
    return Fold<V, W, BLOCK / 2>::run(v);
  }
};
template <class V, int W>
struct Fold<V, W, 1> {
  static ESAPN_INLINE V run(V* v) { return v[0]; }
};

// J columns (a power of two, at least d) of W / J rows at a time, by dot products.
template <class A, int J>
static void project_dots(const A* m, int64_t stride, int64_t d, int64_t width, const A* const* g, int rows,
                         A* x, int64_t x_stride) {
  constexpr int W = LANES<A>, R = W / J;
  typedef Vec<A, W> V;
  const A* columns[J];
  for (int j = 0; j < J; j++) columns[j] = m + (j < d ? j : d - 1) * stride;
  for (int first = 0; first < rows; first += R) {
    V sum[W];
    ESAPN_UNROLL
    for (int i = 0; i < W; i++) sum[i] = V{};
    const A* of[R];
    for (int r = 0; r < R; r++) of[r] = g[first + r < rows ? first + r : rows - 1];
    for (int64_t at = 0; at < width; at += W) {
      V row[J];
      ESAPN_UNROLL
      for (int j = 0; j < J; j++) row[j] = load<V>(columns[j] + at);
      ESAPN_UNROLL
      for (int r = 0; r < R; r++) {
        const V factor = load<V>(of[r] + at);
        ESAPN_UNROLL
        for (int j = 0; j < J; j++) sum[r * J + j] += factor * row[j];
      }
    }
    A found[W];
    store(found, Fold<V, W, W>::run(sum));
    for (int r = 0; r < R && first + r < rows; r++)
      for (int j = 0; j < d; j++) x[(first + r) * x_stride + j] = found[r * J + j];
  }
}

// x_r[j] for j < d; a row of x has room for p.columns() numbers.
template <class A>
static void project(const Projection<A>& p, const A* const* g, int rows, A* x, int64_t x_stride) {
  constexpr int W = LANES<A>;
  if (p.lanes() == W)
    project_lanes<A, W>(p.turned, p.columns(), p.width, g, rows, x, x_stride);
  else if (p.lanes())
    project_lanes<A, HALF_LANES<A>>(p.turned, p.columns(), p.width, g, rows, x, x_stride);
  else if (p.d == 1)
    project_dots<A, 1>(p.m, p.stride, p.d, p.width, g, rows, x, x_stride);
  else if (p.d == 2)
    project_dots<A, (W >= 8 ? 2 : 1)>(p.m, p.stride, p.d, p.width, g, rows, x, x_stride);
  else
    project_dots<A, (W >= 16 ? 4 : 1)>(p.m, p.stride, p.d, p.width, g, rows, x, x_stride);
}
