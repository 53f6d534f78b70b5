// What a row's gradient is for: it is written, or a rule steps the row by it. Mirrors gpu/update.py;
// cpu/update.py writes the rules out. Inside the namespace of an instruction set.

// beta^age in fp64 for any age: the error of a power grows with it.
class Powers {
 public:
  explicit Powers(double beta) : beta_(beta) {
    low_[0] = 1;
    for (int i = 1; i < SIZE; i++) low_[i] = low_[i - 1] * beta;
    const double step = low_[SIZE - 1] * beta;
    high_[0] = 1;
    for (int i = 1; i < SIZE; i++) high_[i] = high_[i - 1] * step;
  }
  ESAPN_INLINE double operator()(int64_t age) const {
    if (age < SIZE) return low_[age < 0 ? 0 : age];
    if (age < SIZE * SIZE) return high_[age / SIZE] * low_[age % SIZE];
    return __builtin_pow(beta_, double(age));
  }

 private:
  static constexpr int SIZE = 128;
  double beta_, low_[SIZE], high_[SIZE];
};

template <class A>
struct Sgd {
  A* e;
  const A* g;
  A lr;
  template <class V>
  ESAPN_INLINE void at(int64_t j) const {
    store(e + j, load<V>(e + j) - lr * load<V>(g + j));
  }
};

template <class A>
struct Adagrad {
  A *e, *sum;
  const A* g;
  A lr, eps;
  template <class V>
  ESAPN_INLINE void at(int64_t j) const {
    const V x = load<V>(g + j), total = load<V>(sum + j) + x * x;
    store(sum + j, total);
    store(e + j, load<V>(e + j) - lr * x / (root(total) + eps));
  }
};

template <class A>
struct Adam {
  A *e, *moment, *square;
  const A* g;
  A decay, keep, take1, take2, lr1, correct2, eps;  // lr1 = lr / (1 - beta1^t)
  template <class V>
  ESAPN_INLINE void at(int64_t j) const {
    const V x = load<V>(g + j);
    const V m = load<V>(moment + j) * decay + take1 * x, v = load<V>(square + j) * keep + take2 * (x * x);
    store(moment + j, m);
    store(square + j, v);
    store(e + j, load<V>(e + j) - lr1 * m / (root(v * correct2) + eps));
  }
};

template <class A>
struct RowwiseAdam {
  A *e, *moment;
  const A* g;
  A decay, take1, lr1;  // lr1: over the root of the row's second moment, too
  template <class V>
  ESAPN_INLINE void at(int64_t j) const {
    const V m = load<V>(moment + j) * decay + take1 * load<V>(g + j);
    store(moment + j, m);
    store(e + j, load<V>(e + j) - lr1 * m);
  }
};

// A NaN passes: it is neither above nor below.
template <class A>
struct Clip {
  A* to;
  const A* g;
  A limit;
  template <class V>
  ESAPN_INLINE void at(int64_t j) const {
    const V x = load<V>(g + j), high = V{} + limit, low = V{} - limit, capped = x > high ? high : x;
    store(to + j, capped < low ? low : capped);
  }
};

// The clipped gradient is scaled and takes the L2 penalty of the row; then the row decays.
template <class A>
struct Decay {
  A *e, *g;
  A scale, l2, shrink;
  template <class V>
  ESAPN_INLINE void at(int64_t j) const {
    const V x = load<V>(e + j);
    store(g + j, load<V>(g + j) * scale + l2 * x);
    store(e + j, x * shrink);
  }
};

// All of d elements, in vectors as wide as there are elements for.
template <class A, class Rule>
ESAPN_INLINE void for_each(const Rule& rule, int64_t d) {
  constexpr int W = LANES<A>;
  int64_t j = 0;
  for (; j + W <= d; j += W) rule.template at<Vec<A, W>>(j);
  if constexpr (ESAPN_BYTES >= 32)
    if (j + W / 2 <= d) {
      rule.template at<Vec<A, W / 2>>(j);
      j += W / 2;
    }
  if constexpr (ESAPN_BYTES >= 64)
    if (j + W / 4 <= d) {
      rule.template at<Vec<A, W / 4>>(j);
      j += W / 4;
    }
  for (; j < d; j++) rule.template at<A>(j);
}

template <class A>
ESAPN_INLINE A square_sum(const A* g, int64_t d) {
  constexpr int W = LANES<A>;
  typedef Vec<A, W> V;
  V sums = V{};
  int64_t j = 0;
  for (; j + W <= d; j += W) {
    const V x = load<V>(g + j);
    sums += x * x;
  }
  A parts[W], sum = 0;
  store(parts, sums);
  for (int half = W / 2; half; half /= 2)
    for (int i = 0; i < half; i++) parts[i] += parts[i + half];
  for (; j < d; j++) sum += g[j] * g[j];
  return sum + parts[0];
}

// Adam's clock moves on to this step.
ESAPN_INLINE void tick(const Update& update) {
  if (!is_adam(update.rule)) return;
  update.clock[0] += 1;
  update.clock[1] *= update.numbers[1];
  update.clock[2] *= update.numbers[2];
}

// Whose gradients are collected, and where each has its place among the values.
ESAPN_INLINE void list_rows(const CollectedRows& rows, const Groups& groups) {
  for (int64_t u = 0; u < groups.count; u++) {
    rows.id[u] = groups.id[u];
    rows.level[u] = int8_t(groups.level[u]);
    rows.place[u] = groups.place[u];
  }
  rows.count[0] = groups.count;
  rows.count[1] = groups.elements;
}

template <class A>
class Step {
 public:
  // `target`: for WRITE the gradient of the storage, for SPARSE the values.
  Step(const Update& update, void* storage, int dtype)
      : rule_(update.rule), dtype_(dtype), item_(itemsize(dtype)), plain_(dtype == DTYPE_OF<A>),
        storage_(static_cast<char*>(storage)), target_(static_cast<char*>(update.target)),
        elements_(update.elements), moment_(static_cast<A*>(update.moment)),
        square_(static_cast<A*>(update.square)), row_sums_(static_cast<A*>(update.row_sums)),
        last_step_(update.last_step), shaped_(update.shaped),
        decay_(is_adam(update.rule) ? update.numbers[1] : 0), keep_(is_adam(update.rule) ? update.numbers[2] : 0) {
    if (!update.numbers) return;
    lr_ = A(update.numbers[5]);
    eps_ = A(update.numbers[6]);
    if (shaped_) {
      l2_ = A(update.numbers[7]);
      shrink_ = A(update.numbers[8]);
      clip_value_ = A(update.numbers[9]);
      clip_row_norm_ = A(update.numbers[10]);
    }
    if (!is_adam(rule_)) return;
    step_ = int64_t(update.clock[0]);
    take1_ = A(1 - update.numbers[1]);
    take2_ = A(1 - update.numbers[2]);
    lr1_ = A(update.numbers[5] / (1 - update.clock[1]));
    correct2_ = A(1 / (1 - update.clock[2]));
  }

  // What a row's step reads besides the row and its gradient.
  ESAPN_INLINE void fetch(int64_t start, int64_t id, int64_t d) const {
    if (is_adam(rule_)) prefetch(moment_ + start, d * int64_t(sizeof(A)));
    if (rule_ == ADAM || rule_ == ADAGRAD) prefetch(square_ + start, d * int64_t(sizeof(A)));
    if (is_adam(rule_)) __builtin_prefetch(last_step_ + id);
    if (rule_ == ROWWISE_ADAGRAD || rule_ == ROWWISE_ADAM) __builtin_prefetch(row_sums_ + id);
  }

  // The row of `id`, at `start`, whose gradient is g; `wide`: memory for 2 d numbers. `place`: where a
  // sparse gradient has its entries, or collected ones theirs.
  ESAPN_INLINE void operator()(int64_t start, int64_t id, const A* g, int64_t d, int64_t place, A* wide) const {
    if (rule_ == WRITE) return write(target_ + start * item_, g, d);
    if (rule_ == COLLECT) {
      __builtin_memcpy(target_ + place * int64_t(sizeof(A)), g, size_t(d) * sizeof(A));
      return;
    }
    if (rule_ == SPARSE) {
      for (int64_t j = 0; j < d; j++) elements_[place + j] = start + j;
      return write(target_ + place * item_, g, d);
    }
    char* row = storage_ + start * item_;
    A* e = plain_ ? reinterpret_cast<A*>(row) : wide;
    if (!plain_) widen(wide, row, dtype_, d);
    if (shaped_) g = shape(e, g, d, wide + d);
    switch (rule_) {
      case SGD: for_each<A>(Sgd<A>{e, g, lr_}, d); break;
      case ADAGRAD: for_each<A>(Adagrad<A>{e, square_ + start, g, lr_, eps_}, d); break;
      case ROWWISE_ADAGRAD: {
        A* sum = row_sums_ + id;
        *sum += square_sum(g, d) / A(d);
        for_each<A>(Sgd<A>{e, g, lr_ / (root(*sum) + eps_)}, d);
        break;
      }
      case ROWWISE_ADAM: {
        const int64_t age = since(id);
        A* square = row_sums_ + id;
        *square = *square * A(keep_(age)) + take2_ * (square_sum(g, d) / A(d));
        const A lr = lr1_ / (root(*square * correct2_) + eps_);
        for_each<A>(RowwiseAdam<A>{e, moment_ + start, g, A(decay_(age)), take1_, lr}, d);
        break;
      }
      default: {
        const int64_t age = since(id);
        for_each<A>(Adam<A>{e, moment_ + start, square_ + start, g, A(decay_(age)), A(keep_(age)), take1_,
                            take2_, lr1_, correct2_, eps_},
                    d);
      }
    }
    if (!plain_) narrow(row, e, dtype_, d);
  }

 private:
  // Steps since the row was last touched, this one included; it is touched now.
  ESAPN_INLINE int64_t since(int64_t id) const {
    const int64_t age = step_ - last_step_[id];
    last_step_[id] = int32_t(step_);
    return age;
  }
  // The gradient as the rule takes it, in `to`; the row decays in place.
  ESAPN_INLINE const A* shape(A* e, const A* g, int64_t d, A* to) const {
    for_each<A>(Clip<A>{to, g, clip_value_}, d);
    A scale = 1;
    if (clip_row_norm_ < A(__builtin_inf())) {
      const A fits = clip_row_norm_ / (root(square_sum(to, d)) + A(1e-6));
      scale = fits > 1 ? A(1) : fits;
    }
    for_each<A>(Decay<A>{e, to, scale, l2_, shrink_}, d);
    return to;
  }
  ESAPN_INLINE void write(char* to, const A* g, int64_t d) const {
    if (plain_)
      __builtin_memcpy(to, g, size_t(d) * sizeof(A));
    else
      narrow(to, g, dtype_, d);
  }

  int rule_, dtype_;
  int64_t item_;
  bool plain_;
  char *storage_, *target_;
  int64_t* elements_;
  A *moment_, *square_;
  A* row_sums_;
  int32_t* last_step_;
  bool shaped_;
  Powers decay_, keep_;
  A lr_ = 0, eps_ = 0, take1_ = 0, take2_ = 0, lr1_ = 0, correct2_ = 0;
  A l2_ = 0, shrink_ = 1, clip_value_ = 0, clip_row_norm_ = 0;
  int64_t step_ = 0;
};
