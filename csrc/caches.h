// What the processor's caches hold.
#pragma once

#include <unistd.h>

#include <cstdint>

// Whether a pass over so many bytes leaves nothing in the caches for the next: then what it writes goes past them.
inline bool beyond_caches(int64_t bytes) {
#if defined(_SC_LEVEL3_CACHE_SIZE)
  static const int64_t known = sysconf(_SC_LEVEL3_CACHE_SIZE);
#else
  static const int64_t known = 0;
#endif
  return bytes > (known > 0 ? known : int64_t{32} << 20);
}
