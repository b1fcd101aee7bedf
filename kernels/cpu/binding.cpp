// Python's view of the driver: pointers and sizes as one list of integers, so that a call costs microseconds and
// nothing here depends on a version of torch. The order of the list is that of native.py.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "conv.hpp"
#include "driver.hpp"
#include "norm.hpp"

namespace nb = nanobind;
using medmamba::Conv;
using medmamba::Norm;
using medmamba::Problem;
using medmamba::Rows;

namespace {

class Reader {
 public:
  explicit Reader(const std::vector<int64_t>& values) : values_(values) {}
  int64_t number() {
    if (at_ >= values_.size()) throw std::invalid_argument("the list of arguments is too short");
    return values_[at_++];
  }
  template <class T>
  T* pointer() {
    return reinterpret_cast<T*>(static_cast<uintptr_t>(number()));
  }
  Rows rows() {
    Rows rows;
    rows.data = pointer<void>();
    rows.type = static_cast<medmamba::Type>(number());
    rows.batch_stride = number();
    rows.token_stride = number();
    rows.channel_stride = number();
    rows.group_stride = number();
    return rows;
  }
  void finish() const {
    if (at_ != values_.size()) throw std::invalid_argument("the list of arguments is too long");
  }

 private:
  const std::vector<int64_t>& values_;
  size_t at_ = 0;
};

Problem read_inputs(Reader& reader) {
  Problem p{};
  for (int64_t* size : {&p.batch, &p.length, &p.channels, &p.groups, &p.state}) {
    *size = reader.number();
  }
  for (Rows* rows : {&p.u, &p.delta, &p.gate, &p.B, &p.C}) *rows = reader.rows();
  p.A = reader.pointer<const float>();
  p.skip = reader.pointer<const float>();
  p.delta_bias = reader.pointer<const float>();
  p.h0 = reader.pointer<const float>();
  p.order = reader.pointer<const int32_t>();
  p.reverse = reader.number() != 0;
  p.softplus = reader.number() != 0;
  p.reset_every = reader.number();
  p.segment = reader.number();
  p.reset_offset = reader.number();
  p.exclusive = reader.number() != 0;
  p.states = reader.pointer<float>();
  return p;
}

void forward(const std::vector<int64_t>& values, int threads, const std::string& instruction_set) {
  Reader reader(values);
  Problem p = read_inputs(reader);
  p.partial = reader.rows();
  p.out = reader.rows();
  p.h_last = reader.pointer<float>();
  reader.finish();
  nb::gil_scoped_release release;
  medmamba::run_forward(p, threads, instruction_set);
}

void backward(const std::vector<int64_t>& values, int threads, const std::string& instruction_set) {
  Reader reader(values);
  Problem p = read_inputs(reader);
  p.grad_out = reader.rows();
  p.grad_h_last = reader.pointer<const float>();
  for (Rows* rows : {&p.grad_u, &p.grad_delta, &p.grad_gate, &p.grad_B, &p.grad_C}) {
    *rows = reader.rows();
  }
  p.grad_A = reader.pointer<float>();
  p.grad_skip = reader.pointer<float>();
  p.grad_delta_bias = reader.pointer<float>();
  p.grad_h0 = reader.pointer<float>();
  reader.finish();
  nb::gil_scoped_release release;
  medmamba::run_backward(p, threads, instruction_set);
}

Conv read_conv(Reader& reader) {
  Conv p{};
  for (int64_t* size : {&p.batch, &p.length, &p.channels}) *size = reader.number();
  p.taps = int(reader.number());
  p.x = reader.rows();
  p.weight = reader.pointer<const float>();
  p.bias = reader.pointer<const float>();
  p.history = reader.pointer<const float>();
  return p;
}

void conv_forward(const std::vector<int64_t>& values, int threads, const std::string& instruction_set) {
  Reader reader(values);
  Conv p = read_conv(reader);
  p.out = reader.rows();
  reader.finish();
  nb::gil_scoped_release release;
  medmamba::run_conv_forward(p, threads, instruction_set);
}

void conv_backward(const std::vector<int64_t>& values, int threads, const std::string& instruction_set) {
  Reader reader(values);
  Conv p = read_conv(reader);
  p.grad_out = reader.rows();
  p.grad_x = reader.rows();
  p.following = reader.pointer<const float>();
  p.grad_first = reader.pointer<float>();
  p.grad_weight = reader.pointer<float>();
  p.grad_bias = reader.pointer<float>();
  reader.finish();
  nb::gil_scoped_release release;
  medmamba::run_conv_backward(p, threads, instruction_set);
}

void norm(const std::vector<int64_t>& values, float eps, float slope, int threads,
          const std::string& instruction_set) {
  Reader reader(values);
  Norm p{};
  for (int64_t* size : {&p.batch, &p.length, &p.channels}) *size = reader.number();
  p.type = static_cast<medmamba::Type>(reader.number());
  p.x = reader.pointer<const void>();
  p.out = reader.pointer<void>();
  p.weight = reader.pointer<const float>();
  p.bias = reader.pointer<const float>();
  p.eps = eps;
  p.slope = slope;
  reader.finish();
  nb::gil_scoped_release release;
  medmamba::run_norm(p, threads, instruction_set);
}

}  // namespace

NB_MODULE(_native, m) {
  m.def("forward", &forward, nb::arg("values"), nb::arg("threads"), nb::arg("instruction_set"));
  m.def("backward", &backward, nb::arg("values"), nb::arg("threads"), nb::arg("instruction_set"));
  m.def("conv_forward", &conv_forward, nb::arg("values"), nb::arg("threads"), nb::arg("instruction_set"));
  m.def("conv_backward", &conv_backward, nb::arg("values"), nb::arg("threads"), nb::arg("instruction_set"));
  m.def("norm", &norm, nb::arg("values"), nb::arg("eps"), nb::arg("slope"), nb::arg("threads"),
        nb::arg("instruction_set"));
  m.def("instruction_sets", &medmamba::instruction_sets);
  m.def("states_shape", &medmamba::states_shape, nb::arg("batch"), nb::arg("length"),
        nb::arg("channels"), nb::arg("groups"), nb::arg("state"), nb::arg("segment"));
}
