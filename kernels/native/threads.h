// A team of threads that run one function together and meet at barriers inside it. Waiting spins for a bounded time and
// then sleeps, because on a machine with fewer cores than threads a spinning waiter keeps the awaited one from running.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>

namespace unspool {

constexpr int MAX_THREADS = 255;

class Team {
 public:
  int size() const { return size_; }

  // Returns once every thread of the team has called it.
  void barrier();

  // Calls body(piece) for pieces 0 .. count - 1, spread over the team, and returns when all are done. Every thread of
  // the team must call it with the same count. Each takes its own contiguous share in order, then helps the others;
  // which thread does a piece must not change its result. A thread that finds nothing left to do calls `idle` before it
  // waits for the others.
  template <typename Body, typename Idle>
  void for_each(int thread, int64_t count, Body body, Idle idle) {
    if (size_ == 1) {
      for (int64_t piece = 0; piece < count; ++piece) body(piece);
      return idle();
    }
    // Two sets of tickets take turns. Nobody is left in the stage before this one, so its set can be reset here.
    const int turn = members_[thread].stage++ & 1;
    members_[thread].taken[turn ^ 1].store(0, std::memory_order_relaxed);
    for (int i = 0; i < size_; ++i) {
      const int owner = (thread + i) % size_;
      const int64_t first = share(owner, count), end = share(owner + 1, count);
      std::atomic<int64_t>& taken = members_[owner].taken[turn];
      while (first + taken.load(std::memory_order_relaxed) < end) {
        const int64_t piece = first + taken.fetch_add(1, std::memory_order_relaxed);
        if (piece >= end) break;
        body(piece);
      }
    }
    idle();
    barrier();
  }

  template <typename Body>
  void for_each(int thread, int64_t count, Body body) {
    for_each(thread, count, body, [] {});
  }

  // The piece that a thread's own share begins with.
  int64_t share(int thread, int64_t count) const { return count * thread / size_; }

 private:
  friend class Pool;
  void begin(int size);

  struct alignas(64) Member {
    std::atomic<int64_t> taken[2];
    int stage;
  };
  Member members_[MAX_THREADS];
  int size_ = 1;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> generation_{0};
  std::atomic<int> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable changed_;
};

using Task = void (*)(void* argument, Team& team, int thread);

// Runs task(argument, team, thread) on `threads` threads, the caller being thread 0. Runs of different callers take
// turns. Threads are started when first needed and kept; a forked child starts its own.
void run(int threads, Task task, void* argument);

// The same for a callable body(team, thread).
template <typename Body>
void run(int threads, Body body) {
  run(threads, [](void* argument, Team& team, int thread) { (*static_cast<Body*>(argument))(team, thread); }, &body);
}

}  // namespace unspool
