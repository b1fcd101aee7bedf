#include "threads.hpp"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <system_error>
#include <thread>

#include "problem.hpp"

namespace medmamba {
namespace {

// Looks before going to sleep, some ten microseconds: sleeping and waking costs as much.
constexpr int kSpins = 256;

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

void await(const int64_t* counter, int64_t least) {
  for (int spins = 0; __atomic_load_n(counter, __ATOMIC_ACQUIRE) < least; ++spins) {
    if (spins < kSpins) {
      pause();
    } else {  // the other thread has lost its processor, perhaps to this one
      std::this_thread::sleep_for(std::chrono::microseconds(30));
    }
  }
}

class Team {
 public:
  std::atomic<bool> leased{false};

  // Number of workers, after an attempt to have as many as wanted.
  int grow(int wanted) {
    std::lock_guard<std::mutex> lock(mutex_);
    try {
      for (; workers_ < wanted; ++workers_) {
        std::thread(&Team::serve, this, workers_, round_.load()).detach();
      }
    } catch (const std::system_error&) {  // the system gives no more
    }
    return workers_;
  }

  void run(int workers, const std::function<void(int)>& work) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      work_ = &work;
      active_ = workers;
      running_ = workers;
      ++round_;
    }
    wake_.notify_all();
    work(0);
    for (int spins = 0; spins < kSpins && running_ > 0; ++spins) pause();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return running_ == 0; });
  }

 private:
  void serve(int index, int64_t seen) {
    for (;;) {
      for (int spins = 0; spins < kSpins && round_ == seen; ++spins) pause();
      const std::function<void(int)>* work = nullptr;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return round_ != seen; });
        seen = round_;
        if (index < active_) work = work_;
      }
      if (work == nullptr) continue;
      (*work)(index + 1);
      std::lock_guard<std::mutex> lock(mutex_);
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::atomic<int64_t> round_{0};
  std::atomic<int> running_{0};
  const std::function<void(int)>* work_ = nullptr;
  int active_ = 0;
  int workers_ = 0;
};

namespace {

std::atomic<Team*> team{nullptr};  // never deleted: its threads outlive every destructor
std::atomic<bool> forked{false};

void register_fork() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] {
    team = nullptr;
    forked = true;
  });
  (void)registered;
}

Team* this_process_team() {
  Team* current = team;
  if (current == nullptr) {
    Team* fresh = new Team;
    if (team.compare_exchange_strong(current, fresh)) return fresh;
    delete fresh;
  }
  return current;
}

// The OpenMP runtime that torch has loaded, GNU's on Linux.
struct OpenMp {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned);
  int (*thread)();
  int (*threads)();

  bool found() const { return parallel != nullptr && thread != nullptr && threads != nullptr; }

  static const OpenMp& loaded() {
    static const OpenMp runtime = {
        reinterpret_cast<decltype(parallel)>(dlsym(RTLD_DEFAULT, "GOMP_parallel")),
        reinterpret_cast<decltype(thread)>(dlsym(RTLD_DEFAULT, "omp_get_thread_num")),
        reinterpret_cast<decltype(threads)>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"))};
    return runtime;
  }
};

struct Region {
  const OpenMp& runtime;
  const std::function<void(int)>& work;
  const int threads;
  std::atomic<bool> complete{true};
};

}  // namespace

Lease::Lease(int threads) {
  if (threads <= 1) return;
  register_fork();
  // what an OpenMP runtime had started is gone after a fork, and it does not notice
  if (OpenMp::loaded().found() && !forked) {
    threads_ = threads;
    return;
  }
  Team* current = this_process_team();
  if (current->leased.exchange(true)) return;
  team_ = current;
  const int workers = current->grow(threads - 1);
  threads_ = 1 + (workers < threads - 1 ? workers : threads - 1);
}

Lease::~Lease() {
  if (team_ != nullptr) team_->leased = false;
}

bool Lease::run(const std::function<void(int)>& work) {
  if (threads_ == 1) {
    work(0);
    return true;
  }
  if (team_ != nullptr) {
    team_->run(threads_ - 1, work);
    return true;
  }
  Region region{OpenMp::loaded(), work, threads_};
  const auto enter = [](void* data) {
    Region& shared = *static_cast<Region*>(data);
    if (shared.runtime.threads() != shared.threads) {
      shared.complete = false;
    } else {
      shared.work(shared.runtime.thread());
    }
  };
  region.runtime.parallel(enter, &region, unsigned(threads_), 0);
  if (!region.complete) threads_ = 1;
  return region.complete;
}

}  // namespace medmamba
