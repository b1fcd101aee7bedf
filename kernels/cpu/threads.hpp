// Threads for one call: nothing survives a fork, nothing is pinned.
#pragma once

#include <condition_variable>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace medmamba {

// Meeting point of the threads of one call.
class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const int64_t round = round_;
    if (++arrived_ == threads_) {
      arrived_ = 0;
      ++round_;
      here_.notify_all();
    } else {
      here_.wait(lock, [&] { return round_ != round; });
    }
  }
  // A thread that could not be started does not take part.
  void shrink(int threads) { threads_ = threads; }

 private:
  std::mutex mutex_;
  std::condition_variable here_;
  int threads_;
  int arrived_ = 0;
  int64_t round_ = 0;
};

// Runs work(thread) on `threads` threads, fewer if the system refuses; the caller is one of them.
inline void on_threads(int threads, const std::function<void(int, Barrier&)>& work) {
  Barrier barrier(threads);
  std::mutex start;  // held until the number of threads is known
  std::vector<std::thread> others;
  {
    std::lock_guard<std::mutex> hold(start);
    try {
      for (int i = 1; i < threads; ++i) {
        others.emplace_back([&, i] {
          { std::lock_guard<std::mutex> wait(start); }
          work(i, barrier);
        });
      }
    } catch (const std::system_error&) {
      barrier.shrink(int(others.size()) + 1);
    }
  }
  work(0, barrier);
  for (std::thread& other : others) other.join();
}

}  // namespace medmamba
