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
  // which thread does a piece must not change its result.
  template <typename Body>
  void for_each(int thread, int64_t count, Body body) {
    if (size_ == 1) {
      for (int64_t piece = 0; piece < count; ++piece) body(piece);
      return;
    }
    // Two sets of tickets take turns. Nobody is left in the stage before this one, so its set can be reset here.
    const int turn = members_[thread].stage++ & 1;
    members_[thread].taken[turn ^ 1].store(0, std::memory_order_relaxed);
    for (int i = 0; i < size_; ++i) {
      const int owner = (thread + i) % size_;
      const int64_t first = count * owner / size_, end = count * (owner + 1) / size_;
      std::atomic<int64_t>& taken = members_[owner].taken[turn];
      while (first + taken.load(std::memory_order_relaxed) < end) {
        const int64_t piece = first + taken.fetch_add(1, std::memory_order_relaxed);
        if (piece >= end) break;
        body(piece);
      }
    }
    barrier();
  }

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
