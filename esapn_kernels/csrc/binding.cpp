// What Python calls. Tensors come as addresses, so that this file needs nothing of torch's, and of
// CPython's stable interface only; cpu/native.py has checked them.
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <string.h>

#include <initializer_list>

#include "kernels.h"

// Of these functions' arguments; ops/backend.py takes no module of another number.
#define ESAPN_INTERFACE 7

namespace {

using namespace esapn;

const Kernels* chosen = nullptr;

// The arguments of a call, one after the other. After a failure they are zeros; `failed` tells.
class Arguments {
 public:
  Arguments(PyObject* const* values, Py_ssize_t count) : next_(values), left_(count) {}

  int64_t integer() {
    PyObject* value = take();
    return value ? PyLong_AsLongLong(value) : 0;
  }
  int small() { return int(integer()); }
  void* address() { return reinterpret_cast<void*>(uintptr_t(integer())); }
  const char* bytes(Py_ssize_t& length) {
    PyObject* value = take();
    char* data = nullptr;
    length = 0;
    if (value) PyBytes_AsStringAndSize(value, &data, &length);
    return data;
  }
  Table table() {
    Table table{};
    table.row_start = address();
    table.wide_start = small() == 8;
    table.rows = integer();
    table.page_level = static_cast<const int8_t*>(address());
    table.page = integer();
    table.capacity = integer();
    sizes(table.sizes, table.n);
    return table;
  }
  Ids ids() {
    Ids ids{};
    ids.data = address();
    ids.wide = small() == 8;
    ids.count = integer();
    return ids;
  }
  // What becomes of the rows' gradients.
  Update update() {
    Update update{};
    update.rule = small();
    update.shaped = small() != 0;
    update.target = address();
    update.elements = static_cast<int64_t*>(address());
    update.numbers = static_cast<const double*>(address());
    update.moment = address();
    update.square = address();
    update.row_sums = address();
    update.last_step = static_cast<int32_t*>(address());
    update.clock = static_cast<double*>(address());
    update.rows.id = static_cast<int64_t*>(address());
    update.rows.level = static_cast<int8_t*>(address());
    update.rows.place = static_cast<int64_t*>(address());
    update.rows.count = static_cast<int64_t*>(address());
    if (update.rule >= SGD) needs(update.numbers);
    if (is_adam(update.rule)) needs(update.clock);
    if (update.rule == COLLECT) needs(update.rows.count);
    return update;
  }
  // As find_movers left them in one tensor.
  Movers movers(int n) {
    Movers movers{};
    movers.count = static_cast<int64_t*>(address());
    movers.id = movers.count + n;
    return movers;
  }
  // The bits of a table's places, and what is counted of them.
  Places places(const Table& table) {
    Places places{};
    places.table = table;
    places.taken = static_cast<uint64_t*>(address());
    places.used = static_cast<int32_t*>(address());
    places.vacant = static_cast<int8_t*>(address());
    places.free = static_cast<int64_t*>(address());
    places.lowest = static_cast<int64_t*>(address());
    places.words = integer();
    needs(places.free);
    if (table.rows) needs(table.row_start);
    if (table.capacity) needs(table.page_level);
    return places;
  }
  const Fill* fills(int& count) {
    Py_ssize_t length;
    const char* data = bytes(length);
    count = int(length / Py_ssize_t(sizeof(Fill)));
    return reinterpret_cast<const Fill*>(data);
  }
  const Moved* moved(int& count) {
    Py_ssize_t length;
    const char* data = bytes(length);
    count = int(length / Py_ssize_t(sizeof(Moved)));
    return reinterpret_cast<const Moved*>(data);
  }
  void sizes(const int64_t*& sizes, int& n) {
    Py_ssize_t length;
    sizes = reinterpret_cast<const int64_t*>(bytes(length));
    n = int(length / Py_ssize_t(sizeof(int64_t)));
    if (!PyErr_Occurred() && (n < 1 || n > MAX_LEVELS)) PyErr_SetString(PyExc_ValueError, "between 1 and 128 sizes");
  }
  // Of an address that is read or written; a tensor of another kind may have none.
  void needs(const void* address) {
    if (!address && !PyErr_Occurred())
      PyErr_SetString(PyExc_RuntimeError, "kernels for CPUs read plain tensors, which hold their numbers themselves");
  }
  void needs(const Table& table, const Ids& ids, const void* storage, const void* composed) {
    if (!ids.count) return;
    needs(ids.data);
    if (table.rows) needs(table.row_start);
    if (table.capacity) {
      needs(table.page_level);
      needs(storage);
    }
    if (table.n > 1) needs(composed);
  }
  bool failed() const {
    if (!PyErr_Occurred() && left_) PyErr_SetString(PyExc_TypeError, "another number of arguments");
    return PyErr_Occurred() != nullptr;
  }

 private:
  PyObject* take() {
    if (left_ <= 0 || PyErr_Occurred()) {
      if (!PyErr_Occurred()) PyErr_SetString(PyExc_TypeError, "another number of arguments");
      return nullptr;
    }
    left_--;
    return *next_++;
  }

  PyObject* const* next_;
  Py_ssize_t left_;
};

// Lets other threads of Python run during a long call. A short one is over sooner than they start.
class Unlocked {
 public:
  explicit Unlocked(bool is_long) : state_(is_long ? PyEval_SaveThread() : nullptr) {}
  ~Unlocked() {
    if (state_) PyEval_RestoreThread(state_);
  }
  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;

 private:
  PyThreadState* state_;
};

bool is_long(const Table& table, const Ids& ids) { return ids.count * table.dim() >= (int64_t(1) << 17); }

PyObject* answer(int status) {
  if (status == OK) Py_RETURN_NONE;
  if (status == OUT_OF_RANGE)
    PyErr_SetString(PyExc_IndexError, "index out of range in self");
  else if (status == NO_ROOM)
    PyErr_SetString(PyExc_RuntimeError, "the arena has no room for the rows that move");
  else
    PyErr_NoMemory();
  return nullptr;
}

PyObject* lookup_fwd(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments arguments(values, count);
  const Table table = arguments.table();
  const Ids ids = arguments.ids();
  const void* storage = arguments.address();
  const int dtype = arguments.small();
  const void* composed = arguments.address();
  void* out = arguments.address();
  const int out_dtype = arguments.small();
  const int threads = arguments.small();
  arguments.needs(table, ids, storage, composed);
  if (ids.count && !arguments.failed() && table.dim()) arguments.needs(out);
  if (arguments.failed()) return nullptr;
  int status;
  {
    const Unlocked unlocked(is_long(table, ids));
    status = check_ids(ids, table.rows);
    if (status == OK)
      status = chosen->lookup_fwd[dtype == F64](table, ids, storage, dtype, composed, out, out_dtype, threads);
  }
  return answer(status);
}

PyObject* lookup_bwd(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments arguments(values, count);
  const Table table = arguments.table();
  const Ids ids = arguments.ids();
  void* storage = arguments.address();
  const int dtype = arguments.small();
  const void* composed = arguments.address();
  const void* grad = arguments.address();
  const int grad_dtype = arguments.small();
  void* grad_composed = arguments.address();
  const int64_t padding = arguments.integer();
  const int threads = arguments.small();
  const Update update = arguments.update();
  arguments.needs(table, ids, storage, composed);
  if (ids.count && !arguments.failed() && table.dim()) arguments.needs(grad);
  if (arguments.failed()) return nullptr;
  int status;
  {
    const Unlocked unlocked(is_long(table, ids));
    status = chosen->lookup_bwd[dtype == F64](table, ids, grad, grad_dtype, storage, dtype, composed,
                                              grad_composed, update, padding, threads);
  }
  return answer(status);
}

PyObject* step_rows(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments arguments(values, count);
  const Table table = arguments.table();
  const Ids ids = arguments.ids();
  const int8_t* level = static_cast<const int8_t*>(arguments.address());
  const int64_t* place = static_cast<const int64_t*>(arguments.address());
  const void* gradients = arguments.address();
  void* storage = arguments.address();
  const int dtype = arguments.small();
  const int threads = arguments.small();
  const Update update = arguments.update();
  if (ids.count) {
    for (const void* address : {ids.data, table.row_start}) arguments.needs(address);
    arguments.needs(table.page_level);
    arguments.needs(level);
    arguments.needs(place);
    if (table.dim()) arguments.needs(gradients);
    if (update.rule >= SGD) arguments.needs(storage);
  }
  if (arguments.failed()) return nullptr;
  int status;
  {
    const Unlocked unlocked(is_long(table, ids));
    status = chosen->step_rows[dtype == F64](table, ids, level, place, gradients, storage, dtype, update, threads);
  }
  return answer(status);
}

PyObject* count_elements(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments arguments(values, count);
  const Table table = arguments.table();
  const Ids ids = arguments.ids();
  const int64_t padding = arguments.integer();
  if (arguments.failed()) return nullptr;
  int status = NO_MEMORY;
  int64_t elements = 0;
  Py_BEGIN_ALLOW_THREADS
  Buffer memory(group_bytes(ids.count));
  if (memory.ok()) {
    Groups groups;
    status = group(groups, memory, table, ids, padding);
    elements = groups.elements;
  }
  Py_END_ALLOW_THREADS
  return status == OK ? PyLong_FromLongLong(elements) : answer(status);
}

PyObject* compose(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments arguments(values, count);
  const int64_t* sizes;
  int n;
  arguments.sizes(sizes, n);
  const bool tails = arguments.small() != 0;
  const int dtype = arguments.small();
  const void* chain = arguments.address();
  void* composed = arguments.address();
  if (n > 1) arguments.needs(chain);
  if (arguments.failed()) return nullptr;
  int status;
  Py_BEGIN_ALLOW_THREADS
  status = chosen->compose[dtype == F64](sizes, n, tails, chain, dtype, composed);
  Py_END_ALLOW_THREADS
  return answer(status);
}

PyObject* compose_bwd(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments arguments(values, count);
  const int64_t* sizes;
  int n;
  arguments.sizes(sizes, n);
  const bool tails = arguments.small() != 0;
  const int dtype = arguments.small();
  const void* grad_composed = arguments.address();
  const void* chain = arguments.address();
  const void* composed = arguments.address();
  void* grad_chain = arguments.address();
  if (n > 1)
    for (const void* address : {grad_composed, chain, composed}) arguments.needs(address);
  if (arguments.failed()) return nullptr;
  int status;
  Py_BEGIN_ALLOW_THREADS
  status = chosen->compose_bwd[dtype == F64](sizes, n, tails, grad_composed, chain, dtype, composed,
                                             grad_chain);
  Py_END_ALLOW_THREADS
  return answer(status);
}

PyObject* find_movers(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments arguments(values, count);
  const Table table = arguments.table();
  const Ids ids = arguments.ids();
  const uint8_t* mask = static_cast<const uint8_t*>(arguments.address());
  const Call call = Call(arguments.small());
  uint8_t* moved = static_cast<uint8_t*>(arguments.address());
  Movers movers = arguments.movers(table.n);
  if (ids.count) {
    for (const void* address : {static_cast<const void*>(ids.data), table.row_start}) arguments.needs(address);
    arguments.needs(table.page_level);
  }
  if (arguments.failed()) return nullptr;
  int status;
  Py_BEGIN_ALLOW_THREADS
  status = esapn::find_movers(movers, moved, table, ids, mask, call);
  Py_END_ALLOW_THREADS
  if (status != OK) return answer(status);
  PyObject* counts = PyList_New(table.n);
  for (int k = 0; counts && k < table.n; k++) {
    PyObject* rows = PyLong_FromLongLong(movers.count[k]);
    if (!rows || PyList_SetItem(counts, k, rows) < 0) Py_CLEAR(counts);
  }
  return counts;
}

PyObject* move_rows(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments arguments(values, count);
  Resize resize{};
  resize.table = arguments.table();
  resize.call = Call(arguments.small());
  resize.target = arguments.small();
  resize.movers = arguments.movers(resize.table.n);
  Places places = arguments.places(resize.table);
  resize.places = &places;
  resize.moves = static_cast<int64_t*>(arguments.address());
  resize.storage = static_cast<char*>(arguments.address());
  resize.dtype = arguments.small();
  resize.chain = arguments.address();
  resize.states = arguments.fills(resize.n_states);
  resize.per_id = arguments.fills(resize.n_per_id);
  arguments.needs(resize.movers.count);
  if (!arguments.failed() && resize.movers.total(resize.table.n)) {
    arguments.needs(resize.storage);
    arguments.needs(resize.table.row_start);
    if (resize.hops()) arguments.needs(resize.chain);
  }
  if (arguments.failed()) return nullptr;
  int status = OUT_OF_RANGE;
  Py_BEGIN_ALLOW_THREADS
  resize.movers.start = resize.movers.id + resize.movers.total(resize.table.n);
  if (resize.target >= 0 && resize.target < resize.table.n)
    status = chosen->move_rows[resize.dtype == F64](resize);
  Py_END_ALLOW_THREADS
  return answer(status);
}

PyObject* find_places(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments arguments(values, count);
  Places places = arguments.places(arguments.table());
  if (arguments.failed()) return nullptr;
  int status;
  Py_BEGIN_ALLOW_THREADS
  status = places.find();
  Py_END_ALLOW_THREADS
  return answer(status);
}

PyObject* lower_rows(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments arguments(values, count);
  Places places = arguments.places(arguments.table());
  const int64_t first = arguments.integer(), end = arguments.integer();
  int n_moved;
  const Moved* moved = arguments.moved(n_moved);
  int64_t* from = static_cast<int64_t*>(arguments.address());
  int64_t* to = static_cast<int64_t*>(arguments.address());
  if (first < end) arguments.needs(from);
  for (int t = 0; t < n_moved && places.table.capacity; t++) arguments.needs(moved[t].target);
  if (arguments.failed()) return nullptr;
  if (first < 0 || end > places.table.rows) return answer(OUT_OF_RANGE);
  int64_t rows;
  Py_BEGIN_ALLOW_THREADS
  rows = esapn::lower_rows(places, first, end, moved, n_moved, from, to);
  Py_END_ALLOW_THREADS
  return PyLong_FromLongLong(rows);
}

PyObject* equal_bytes(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments arguments(values, count);
  const void* one = arguments.address();
  const void* other = arguments.address();
  const int64_t length = arguments.integer();
  if (arguments.failed()) return nullptr;
  return PyBool_FromLong(memcmp(one, other, size_t(length)) == 0);
}

PyObject* use_large_pages(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments arguments(values, count);
  void* memory = arguments.address();
  const int64_t bytes = arguments.integer();
  if (arguments.failed()) return nullptr;
  Py_BEGIN_ALLOW_THREADS
  if (bytes >= LARGE) advise_large_pages(memory, bytes, true);
  Py_END_ALLOW_THREADS
  Py_RETURN_NONE;
}

// Python's lock is kept from the count to the last assignment: no other thread takes an alias of the
// old memory, or reads what has been given back.
PyObject* move_memory(PyObject*, PyObject* const* values, Py_ssize_t count) {
  if (count < 7) {
    PyErr_SetString(PyExc_TypeError, "too few arguments");
    return nullptr;
  }
  Arguments arguments(values + 2, 4);
  const int64_t alone = arguments.integer();
  void* to = arguments.address();
  void* from = arguments.address();
  const int64_t bytes = arguments.integer();
  if (arguments.failed()) return nullptr;
  PyObject* found = PyObject_CallFunctionObjArgs(values[0], values[1], nullptr);
  if (!found) return nullptr;
  const int64_t holders = PyLong_AsLongLong(found);
  Py_DECREF(found);
  if (PyErr_Occurred()) return nullptr;
  if (holders != alone) Py_RETURN_FALSE;
  move_bytes(to, from, bytes);
  for (Py_ssize_t i = 7; i < count; i++)
    if (PyObject_SetAttrString(values[6], "data", values[i])) return nullptr;
  Py_RETURN_TRUE;
}

PyObject* instruction_sets(PyObject*, PyObject*) {
  PyObject* names = PyList_New(0);
  for (const Kernels* const* kernels = available(); names && *kernels; kernels++) {
    PyObject* name = PyUnicode_FromString((*kernels)->name);
    if (!name || PyList_Append(names, name) < 0) Py_CLEAR(names);
    Py_XDECREF(name);
  }
  return names;
}

PyObject* instruction_set(PyObject*, PyObject*) { return PyUnicode_FromString(chosen->name); }

PyObject* use(PyObject*, PyObject* name) {
  PyObject* before = PyUnicode_FromString(chosen->name);
  PyObject* encoded = before ? PyUnicode_AsUTF8String(name) : nullptr;
  const char* text = encoded ? PyBytes_AsString(encoded) : nullptr;
  const Kernels* found = nullptr;
  for (const Kernels* const* kernels = available(); text && *kernels; kernels++)
    if (!strcmp((*kernels)->name, text)) found = *kernels;
  Py_XDECREF(encoded);
  if (found) {
    chosen = found;
    return before;
  }
  Py_XDECREF(before);
  if (!PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "no such instruction set on this machine");
  return nullptr;
}

template <class F>
PyCFunction fast(F function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef methods[] = {
    {"lookup_fwd", fast(lookup_fwd), METH_FASTCALL, "(table, ids, storage, composed, out, threads)"},
    {"lookup_bwd", fast(lookup_bwd), METH_FASTCALL,
     "(table, ids, storage, composed, grad, grad_composed, padding, threads, update)"},
    {"step_rows", fast(step_rows), METH_FASTCALL,
     "(table, ids, level, place, gradients, storage, dtype, threads, update)"},
    {"count_elements", fast(count_elements), METH_FASTCALL, "(table, ids, padding): of the distinct rows"},
    {"compose", fast(compose), METH_FASTCALL, "(sizes, tails, dtype, chain, composed)"},
    {"compose_bwd", fast(compose_bwd), METH_FASTCALL,
     "(sizes, tails, dtype, grad_composed, chain, composed, grad_chain)"},
    {"find_movers", fast(find_movers), METH_FASTCALL,
     "(table, ids, mask, call, moved, movers): the rows that move, by the level that they leave"},
    {"move_rows", fast(move_rows), METH_FASTCALL,
     "(table, call, target, movers, places, moves, storage, dtype, chain, states, per_id)"},
    {"find_places", fast(find_places), METH_FASTCALL, "(table, places): derived from where the rows lie"},
    {"lower_rows", fast(lower_rows), METH_FASTCALL,
     "(table, places, first, end, moved, from, to): rows go to lower pages of their level; returns their number"},
    {"equal_bytes", fast(equal_bytes), METH_FASTCALL, "(one, other, length)"},
    {"use_large_pages", fast(use_large_pages), METH_FASTCALL, "(memory, bytes): where it is much"},
    {"move_memory", fast(move_memory), METH_FASTCALL,
     "(holders, storage, alone, to, from, bytes, tensor, *data): where holders(storage) is alone"},
    {"instruction_sets", instruction_sets, METH_NOARGS, "Those that this machine runs, the widest first."},
    {"instruction_set", instruction_set, METH_NOARGS, "The one whose kernels run."},
    {"use", use, METH_O, "Take the kernels of an instruction set; returns the one before."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "esapn_kernels._native", "The operators for CPUs; see cpu/native.py.", 0, methods,
    nullptr, nullptr, nullptr, nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__native() {
  chosen = *available();
  PyObject* module = PyModule_Create(&definition);
  if (module && PyModule_AddIntConstant(module, "INTERFACE", ESAPN_INTERFACE) < 0) Py_CLEAR(module);
  return module;
}
