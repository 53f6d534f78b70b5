// Tasks on the OpenMP pool that torch runs already, and memory that lasts for one call.
#pragma once
#include "table.h"

namespace esapn {

// Workers that `run_tasks` has at most.
ESAPN_INLINE int64_t workers(int64_t tasks, int threads) {
  return threads < 1 ? 1 : threads < tasks ? threads : tasks > 1 ? tasks : 1;
}

// Runs task(context, i, worker) for i in [0, tasks), on up to `threads` threads, whose numbers are
// below workers(tasks, threads). Which worker takes which task is left open: results must not depend
// on it.
void run_tasks(void (*task)(void*, int64_t, int64_t), void* context, int64_t tasks, int threads);

template <class F>
ESAPN_INLINE void parallel(int64_t tasks, int threads, const F& body) {
  run_tasks([](void* context, int64_t i, int64_t worker) { (*static_cast<const F*>(context))(i, worker); },
            const_cast<F*>(&body), tasks, threads);
}

// Results from so many bytes on are taken to pass through every cache (what systems say of their
// caches' sizes is not to be relied on).
constexpr int64_t LARGE = int64_t(16) << 20;

// Asks the system for large pages: for memory that is still to be touched, or, where `now`, in place
// of those that it lies on already. Advice only: where it is not taken, nothing changes.
void advise_large_pages(void* memory, int64_t bytes, bool now = false);

// Copies in pieces and gives the old pages back to the system as it goes: what they hold is lost.
void move_bytes(void* to, void* from, int64_t bytes);

// Memory aligned to 64 bytes, not initialised; freed when it goes out of scope.
class Buffer {
 public:
  explicit Buffer(int64_t bytes);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  // The next `count` elements; null where the buffer had no memory.
  template <class T>
  ESAPN_INLINE T* take(int64_t count) {
    char* here = next_;
    if (here) next_ += padded<T>(count);
    return reinterpret_cast<T*>(here);
  }
  template <class T>
  static ESAPN_INLINE int64_t padded(int64_t count) {
    return (count * int64_t(sizeof(T)) + 63) / 64 * 64;
  }
  ESAPN_INLINE bool ok() const { return memory_ != nullptr; }

 private:
  char* memory_;
  char* next_;
};

}  // namespace esapn
