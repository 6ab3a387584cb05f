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

// A CPU tensor of this dtype with exactly these axes, none of them empty, of any strides.
inline void require_axes(const char* op, const char* argument, const Tensor& x, const Axes& axes,
                         ScalarType dtype = ScalarType::Float) {
  if (!x.is_cpu()) refuse(op, argument, "on the CPU", "another device");
  require_sizes(op, argument, x, axes, dtype);
}

// The same, contiguous.
inline void require(const char* op, const char* argument, const Tensor& x, const Axes& axes,
                    ScalarType dtype = ScalarType::Float) {
  require_axes(op, argument, x, axes, dtype);
  require_contiguous(op, argument, x);
}

// Contiguous and of the device and dtype of `like`, anywhere.
inline void require_like(const char* op, const char* argument, const Tensor& x, const Tensor& like, const Axes& axes) {
  if (x.device() != like.device()) refuse(op, argument, "on one device with the others", "another device");
  require_sizes(op, argument, x, axes, like.scalar_type());
  require_contiguous(op, argument, x);
}

// The same with a contiguous last axis: rows, as a slice of a wider tensor has them.
inline void require_rows(const char* op, const char* argument, const Tensor& x, const Axes& axes,
                         ScalarType dtype = ScalarType::Float) {
  require_axes(op, argument, x, axes, dtype);
  const bool rows = x.stride(x.dim() - 1) == 1 || x.size(x.dim() - 1) == 1;
  if (!rows) refuse(op, argument, "contiguous in its last axis", "strides " + tuple(x.strides()));
}

// [B, T, D] whose last axis lies side by side, or else its tokens: memory that is [B, D, T].
inline void require_tokens(const char* op, const char* argument, const Tensor& x, const Axes& axes, ScalarType dtype) {
  require_axes(op, argument, x, axes, dtype);
  const bool fits = x.stride(2) == 1 || x.size(2) == 1 || x.stride(1) == 1 || x.size(1) == 1;
  if (!fits) refuse(op, argument, "contiguous in D or in T", "strides " + tuple(x.strides()));
}

// int32 [N + 1]: 0 first, T last, never falling.
inline void require_boundaries(const char* op, const char* argument, const Tensor& x, int64_t T) {
  if (x.dim() != 1 || x.size(0) < 2) refuse(op, argument, "[N+1] with N at least 1", "shape " + tuple(x.sizes()));
  require(op, argument, x, {{"N+1", x.size(0)}}, ScalarType::Int);
  const int32_t* bounds = x.const_data_ptr<int32_t>();
  bool fits = bounds[0] == 0 && bounds[x.size(0) - 1] == T;
  for (int64_t i = 1; i < x.size(0); i++) fits = fits && bounds[i - 1] <= bounds[i];
  if (!fits)
    refuse(op, argument, "0 first, T=" + std::to_string(T) + " last and never falling",
           tuple(std::vector<int32_t>(bounds, bounds + x.size(0))));
}

}  // namespace checks
