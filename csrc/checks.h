// The one refusal, in the sentence that lcikernels/ops/checks.py uses: op, argument, expected, got.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace checks {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Axis {
  const char* name;
  int64_t size;
};
using Axes = std::vector<Axis>;

[[noreturn]] inline void refuse(const char* op, const char* argument, const std::string& expected,
                                const std::string& got) {
  throw std::runtime_error(std::string(op) + ": " + argument + " must be " + expected + ", got " + got);
}

template <typename Values>
std::string tuple(const Values& values) {
  std::ostringstream text;
  text << "(";
  for (size_t i = 0; i < values.size(); i++) text << (i ? ", " : "") << values[i];
  text << (values.size() == 1 ? ",)" : ")");
  return text.str();
}

inline std::string layout(const Axes& axes) {
  std::string text = "[";
  for (size_t i = 0; i < axes.size(); i++) text += std::string(i ? ", " : "") + axes[i].name;
  return text + "]";
}

// A tensor of this dtype with exactly these axes, none of them empty, anywhere and of any strides.
inline void require_sizes(const char* op, const char* argument, const Tensor& x, const Axes& axes, ScalarType dtype) {
  if (x.scalar_type() != dtype) refuse(op, argument, toString(dtype), toString(x.scalar_type()));
  const auto shape = x.sizes();
  if (shape.size() != axes.size())
    refuse(op, argument, layout(axes), std::to_string(shape.size()) + " axes: shape " + tuple(shape));
  for (size_t i = 0; i < axes.size(); i++) {
    if (shape[i] == axes[i].size && shape[i]) continue;
    const bool empty = shape[i] == axes[i].size;
    const std::string fits = empty ? " at least 1" : "=" + std::to_string(axes[i].size);
    refuse(op, argument, layout(axes) + " with " + axes[i].name + fits,
           std::to_string(shape[i]) + " on axis " + std::to_string(i) + " of shape " + tuple(shape));
  }
}

inline void require_contiguous(const char* op, const char* argument, const Tensor& x) {
  if (!x.is_contiguous()) refuse(op, argument, "contiguous", "strides " + tuple(x.strides()));
}

// Contiguous and of the device and dtype of `like`, anywhere.
inline void require_like(const char* op, const char* argument, const Tensor& x, const Tensor& like, const Axes& axes) {
  if (x.device() != like.device()) refuse(op, argument, "on one device with the others", "another device");
  require_sizes(op, argument, x, axes, like.scalar_type());
  require_contiguous(op, argument, x);
}

}  // namespace checks
