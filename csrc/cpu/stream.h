// Stores past the caches. Included by kernel files only.
#pragma once

#include "vec.h"

namespace ISA {

// to[0 .. size) <- from, past the caches: what is written is not read there first. For more than they hold.
template <typename E>
INLINE void stream(E* to, const E* from, int64_t size) {
#if defined(__SSE__)
  const int64_t line = 64 / sizeof(E), ahead = (64 - reinterpret_cast<uintptr_t>(to) % 64) % 64 / sizeof(E);
  const int64_t head = ahead < size ? ahead : size;
  memcpy(to, from, head * sizeof(E));
  int64_t i = head;
  for (; i + line <= size; i += line)
    for (int64_t at = 0; at < 64; at += BYTES) {
      Floats v;
      memcpy(&v, reinterpret_cast<const char*>(from + i) + at, BYTES);
      float* const there = reinterpret_cast<float*>(reinterpret_cast<char*>(to + i) + at);
#if defined(__AVX512F__)
      _mm512_stream_ps(there, (__m512)v);
#elif defined(__AVX2__) && defined(__FMA__)
      _mm256_stream_ps(there, (__m256)v);
#else
      _mm_stream_ps(there, (__m128)v);
#endif
    }
  memcpy(to + i, from + i, (size - i) * sizeof(E));
#else
  memcpy(to, from, size * sizeof(E));
#endif
}
// A vector that is a whole line.
template <typename R>
INLINE void stream_line(R* line, Vec<R> v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(reinterpret_cast<float*>(line), (__m512)v);
#else
  store(line, v);
#endif
}
// What was streamed is there for every thread that this one hands over to.
INLINE void streamed() {
#if defined(__SSE__)
  _mm_sfence();
#endif
}

}  // namespace ISA
