#include "pages.hpp"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace medmamba {

#if defined(__linux__)
namespace {

#if !defined(MADV_POPULATE_WRITE)
#define MADV_POPULATE_WRITE 23  // Linux 5.14
#endif

constexpr int64_t kSmallest = 1 << 18;  // bytes: less is soon written, and often resident already
constexpr int64_t kPagesAtOnce = 64;

}  // namespace

void make_resident(void* data, int64_t bytes, int thread, int threads) {
  if (data == nullptr || bytes < kSmallest) return;
  static const int64_t size = sysconf(_SC_PAGESIZE);
  const int64_t address = reinterpret_cast<int64_t>(data);
  const int64_t first = (address + size - 1) / size, pages = (address + bytes) / size - first;
  const int64_t stop = first + pages * (thread + 1) / threads;
  unsigned char resident[kPagesAtOnce];
  for (int64_t page = first + pages * thread / threads; page < stop; page += kPagesAtOnce) {
    const int64_t count = stop - page < kPagesAtOnce ? stop - page : kPagesAtOnce;
    void* at = reinterpret_cast<void*>(page * size);
    if (mincore(at, size_t(count * size), resident) != 0) return;
    bool missing = false;
    for (int64_t i = 0; i < count; ++i) missing = missing || (resident[i] & 1) == 0;
    if (missing && madvise(at, size_t(count * size), MADV_POPULATE_WRITE) != 0) return;  // they come one by one then
  }
}
#else
void make_resident(void*, int64_t, int, int) {}
#endif

void make_resident(const Problem& p, const Rows& rows, int thread, int threads) {
  const int64_t values = p.batch * p.length * p.channels;
  const int64_t span = (p.batch - 1) * rows.batch_stride + (p.length - 1) * rows.token_stride +
                       (p.channels - 1) * rows.channel_stride + 1;
  if (values == 0 || span != values) return;
  make_resident(rows.data, values * (rows.type == Type::float32 ? 4 : 2), thread, threads);
}

}  // namespace medmamba
