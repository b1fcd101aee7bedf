// The kernels of the instruction set this file is compiled for (three times on x86-64). One block of 16 channels fills
// the lanes, so every sum over states stays inside a lane. Allocates nothing.
#include "backward.hpp"
#include "forward.hpp"

namespace medmamba {
namespace MEDMAMBA_ISA {
namespace {

void add_state(const Problem& p, const Item& item, int64_t number, const float* from, float* to) {
  const Block block = block_at(p, number);
  const int64_t last = item.half == 0 ? p.half_state() : p.state;
  for (int lane = 0; lane < block.lanes; ++lane) {
    for (int64_t n = item.half == 1 ? p.half_state() : 0; n < last && n < p.state; ++n) {
      to[(block.channel + lane) * p.state + n] += from[n * kLanes + lane];
    }
  }
}

void add_channels(const Problem& p, int64_t number, const float* from, float* to) {
  const Block block = block_at(p, number);
  for (int lane = 0; lane < block.lanes; ++lane) to[block.channel + lane] += from[lane];
}

}  // namespace

const Kernels kernels = {MEDMAMBA_ISA_NAME, forward,          forward_scratch,
                         begin_backward,    backward_tile,    backward_scratch,
                         share_floats,      add_share,        add_state,
                         add_channels,      store_projection};

}  // namespace MEDMAMBA_ISA

const Kernels& MEDMAMBA_KERNELS() { return MEDMAMBA_ISA::kernels; }

}  // namespace medmamba
