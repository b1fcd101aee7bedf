// Threads for one call. They are those of the OpenMP runtime that torch has loaded, so that they do not compete with
// torch's own, which spin for a while after every operation. Where there is none, and in a forked child, whose
// runtime is broken, they are this library's: started when first needed, asleep between calls; a call
// that comes while another has them works alone. No result depends on which it was.
#pragma once

#include <functional>

namespace medmamba {

class Team;

class Lease {
 public:
  // The caller and up to threads - 1 others, fewer where the system refuses.
  explicit Lease(int threads);
  ~Lease();
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;
  int threads() const { return threads_; }
  // work(0) on the caller, work(1) to work(threads() - 1) on the others, at the same time. False where the runtime
  // gave fewer: then nothing was done, and threads() is 1 for another attempt.
  bool run(const std::function<void(int)>& work);

 private:
  Team* team_ = nullptr;
  int threads_ = 1;
};

}  // namespace medmamba
