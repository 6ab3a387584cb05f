// Where the elements of a caller's tensor lie. No torch here: kernel files include this.
#pragma once

#include <cstdint>

// x [B, T, D] by the elements from a row to the next, from a token and from a channel. Either channels lie side by
// side, or tokens do: it is turned. As a pointer it is the first element, which is enough of what is dense.
template <typename E>
struct Tokens {
  E* data;
  int64_t row, token, channel;

  bool turned() const { return channel != 1; }
  E* at(int64_t b, int64_t t, int64_t d) const { return data + b * row + t * token + d * channel; }
  operator E*() const { return data; }
};
template <typename E>
Tokens<const E> constant(const Tokens<E>& x) {
  return {x.data, x.row, x.token, x.channel};
}

// x [B, T, heads, width], whose columns lie side by side.
template <typename E>
struct Heads {
  E* data;
  int64_t row, token, head;

  E* at(int64_t b, int64_t t, int64_t h) const { return data + b * row + t * token + h * head; }
};

// x [B, T, G, N], of any strides.
template <typename E>
struct Projected {
  E* data;
  int64_t row, token, group, state;

  E* at(int64_t b, int64_t t, int64_t g) const { return data + b * row + t * token + g * group; }
  operator E*() const { return data; }
};
