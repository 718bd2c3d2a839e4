#include "threads.h"

#include <thread>
#include <vector>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace unspool {
namespace {

constexpr int THREAD_BITS = 8;
constexpr int BARRIER_SPINS = 2000;  // some tens of microseconds
constexpr int IDLE_SPINS = 4000;     // about what the caller takes between two decode steps

void pause() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("isb");
#endif
}

long process_id() {
#if defined(__unix__) || defined(__APPLE__)
  return getpid();
#else
  return 0;
#endif
}

// Waits until `word` differs from `seen`. `sleepers` is raised before the last look, so a waker that changed the word
// before it looked at `sleepers` is always seen.
void wait_for_change(std::atomic<uint32_t>& word, uint32_t seen, int spins, std::atomic<int>& sleepers,
                     std::mutex& mutex, std::condition_variable& changed) {
  for (int i = 0; i < spins; ++i) {
    if (word.load(std::memory_order_acquire) != seen) return;
    pause();
  }
  std::unique_lock<std::mutex> lock(mutex);
  sleepers.fetch_add(1);
  changed.wait(lock, [&] { return word.load() != seen; });
  sleepers.fetch_sub(1);
}

void change(std::atomic<uint32_t>& word, uint32_t value, std::atomic<int>& sleepers, std::mutex& mutex,
            std::condition_variable& changed) {
  word.store(value);
  if (sleepers.load() > 0) {
    std::lock_guard<std::mutex> lock(mutex);
    changed.notify_all();
  }
}

}  // namespace

void Team::begin(int size) {
  size_ = size;
  arrived_.store(0);
  for (int i = 0; i < size; ++i) {
    members_[i].taken[0].store(0);
    members_[i].taken[1].store(0);
    members_[i].stage = 0;
  }
}

void Team::barrier() {
  const int size = size_;  // once arrived, the next run may begin and change it
  if (size == 1) return;
  const uint32_t seen = generation_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
    arrived_.store(0, std::memory_order_relaxed);
    change(generation_, seen + 1, sleepers_, mutex_, changed_);
  } else {
    wait_for_change(generation_, seen, BARRIER_SPINS, sleepers_, mutex_, changed_);
  }
}

class Pool {
 public:
  void run(int threads, Task task, void* argument) {
    std::lock_guard<std::mutex> turn(turn_);
    team_.begin(threads);
    if (threads == 1) return task(argument, team_, 0);
    while (workers_ < threads - 1) start_worker();
    task_ = task;
    argument_ = argument;
    const uint32_t number = (call_.load() >> THREAD_BITS) + 1;
    change(call_, number << THREAD_BITS | (uint32_t)threads, sleepers_, mutex_, changed_);
    task(argument, team_, 0);
    team_.barrier();  // nobody is still in the task when its caller goes on
  }

 private:
  void start_worker() {
    const int thread = ++workers_;
    std::thread([this, thread, seen = call_.load()] { work(thread, seen); }).detach();
  }

  void work(int thread, uint32_t seen) {
    for (;;) {
      wait_for_change(call_, seen, IDLE_SPINS, sleepers_, mutex_, changed_);
      seen = call_.load();
      // A call cannot end without its members, so what they read here is theirs; others sit it out.
      if (thread >= (int)(seen & MAX_THREADS)) continue;
      task_(argument_, team_, thread);
      team_.barrier();
    }
  }

  std::mutex turn_;
  Team team_;
  int workers_ = 0;
  Task task_ = nullptr;
  void* argument_ = nullptr;
  alignas(64) std::atomic<uint32_t> call_{0};  // number of the call, and in its low bits how many threads it has
  std::atomic<int> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable changed_;
};

void run(int threads, Task task, void* argument) {
  // Never destroyed: its threads may outlive every static object. A forked child has none of its parent's threads.
  static std::mutex mutex;
  static Pool* pool = nullptr;
  static long owner = 0;
  Pool* mine;
  {
    std::lock_guard<std::mutex> lock(mutex);
    if (pool == nullptr || owner != process_id()) {
      pool = new Pool;
      owner = process_id();
    }
    mine = pool;
  }
  mine->run(threads < 1 ? 1 : threads > MAX_THREADS ? MAX_THREADS : threads, task, argument);
}

}  // namespace unspool
