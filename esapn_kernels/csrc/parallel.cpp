#include "parallel.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <atomic>
#include <initializer_list>

namespace esapn {
namespace {

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

std::atomic<bool> forked{false};

// torch loads its OpenMP library for all to see. Linking one would bring a second pool into the
// process where torch's has another name. LLVM's and Intel's libraries have GNU's entry as well.
Parallel find_pool() {
  pthread_atfork(nullptr, nullptr, [] { forked.store(true); });
  void* found = dlsym(RTLD_DEFAULT, "GOMP_parallel");
#if defined(RTLD_NOLOAD)
  for (const char* name : {"libgomp.so.1", "libomp.so", "libiomp5.so"})
    if (!found)
      if (void* library = dlopen(name, RTLD_LAZY | RTLD_NOLOAD)) found = dlsym(library, "GOMP_parallel");
#endif
  return reinterpret_cast<Parallel>(found);
}

// Found when the module is loaded, after torch: a static of a function has a guard, which is
// libstdc++'s, and a fork before the first call counts as well.
const Parallel pool = find_pool();

bool find_large_pages() {
  char text[64] = {};
  const int file = open("/sys/kernel/mm/transparent_hugepage/enabled", O_RDONLY | O_CLOEXEC);
  if (file < 0) return false;
  const bool found = read(file, text, sizeof text - 1) > 0 && !strstr(text, "[never]");
  close(file);
  return found;
}

const bool grants_large_pages = find_large_pages();

struct Work {
  void (*task)(void*, int64_t, int64_t);
  void* context;
  int64_t tasks;
  std::atomic<int64_t> next{0}, worker{0};

  void run() {
    const int64_t mine = worker.fetch_add(1, std::memory_order_relaxed);
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) task(context, i, mine);
  }
};

}  // namespace

void run_tasks(void (*task)(void*, int64_t, int64_t), void* context, int64_t tasks, int threads) {
  Work work{task, context, tasks};
  if (threads > tasks) threads = int(tasks);
  // The pool's threads do not live on in a forked process: waiting for them would never end.
  if (threads > 1 && pool && !forked.load())
    pool([](void* shared) { static_cast<Work*>(shared)->run(); }, &work, unsigned(threads), 0);
  else
    work.run();
}

void advise_large_pages(void* memory, int64_t bytes, bool now) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + page - 1) / page * page;
  const uintptr_t end = reinterpret_cast<uintptr_t>(memory) + uintptr_t(bytes);
  if (begin >= end) return;
  constexpr int COLLAPSE = 25;  // MADV_COLLAPSE, which older headers lack
  const bool advised = madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE) == 0;
  // It takes its time, which much memory, fresh from the system in any case, does not need; and it
  // would not heed that the system's large pages are switched off.
  if (advised && now && bytes <= int64_t(256) << 20 && grants_large_pages)
    (void)madvise(reinterpret_cast<void*>(begin), end - begin, COLLAPSE);
#else
  (void)memory;
  (void)bytes;
  (void)now;
#endif
}

void move_bytes(void* to, void* from, int64_t bytes) {
  char *const source = static_cast<char*>(from), *const target = static_cast<char*>(to);
#if defined(__linux__)
  // Whole pieces of memory, aligned to large pages, of which the system would keep a part.
  constexpr uintptr_t PIECE = uintptr_t(16) << 20, LARGE_PAGE = uintptr_t(2) << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(from), end = begin + uintptr_t(bytes);
  uintptr_t kept = (begin + LARGE_PAGE - 1) / LARGE_PAGE * LARGE_PAGE;
  for (uintptr_t at = begin; at < end;) {
    const uintptr_t next = end - at > PIECE ? at + PIECE : end;
    memcpy(target + (at - begin), source + (at - begin), next - at);
    at = next;
    const uintptr_t copied = at / LARGE_PAGE * LARGE_PAGE;
    if (copied <= kept) continue;
    (void)madvise(reinterpret_cast<void*>(kept), copied - kept, MADV_DONTNEED);
    kept = copied;
  }
#else
  memcpy(target, source, size_t(bytes));
#endif
}

Buffer::Buffer(int64_t bytes) : memory_(nullptr) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, size_t(bytes > 0 ? (bytes + 63) / 64 * 64 : 64)) == 0)
    memory_ = static_cast<char*>(memory);
  next_ = memory_;
}

Buffer::~Buffer() { free(memory_); }

}  // namespace esapn
