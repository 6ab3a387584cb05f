// What the compiler would take from a newer system than torch's wheels need (glibc 2.28, libstdc++ of GCC 8) is here
// instead, so that the library loads wherever torch does.

#include <new>
#include <sstream>

#define HIDDEN(symbol) __asm__(symbol) __attribute__((visibility("hidden")))

// In libstdc++ since GCC 9: torch's headers call it.
template std::basic_ostringstream<char>::basic_ostringstream();
template std::basic_stringstream<char>::basic_stringstream();

// In libstdc++ since GCC 11: std::vector calls std::__throw_bad_array_new_length().
[[noreturn]] void too_long() HIDDEN("_ZSt28__throw_bad_array_new_lengthv");
void too_long() { throw std::bad_array_new_length(); }

// In glibc since 2.32: std::shared_ptr asks it. False is right everywhere, it then counts atomically.
char single_threaded HIDDEN("__libc_single_threaded") = false;

// glibc 2.29 has a second exp and exp2, which set errno but do not call matherr(). The first ones do both.
#if defined(__x86_64__)
#define OLDEST "GLIBC_2.2.5"
#elif defined(__aarch64__)
#define OLDEST "GLIBC_2.17"
#endif
#if defined(__GLIBC__) && defined(OLDEST)
#define FIRST(name)                                      \
  __asm__(".symver first_" #name ", " #name "@" OLDEST); \
  extern "C" double first_##name(double);                \
  double old_##name(double) HIDDEN(#name);               \
  double old_##name(double x) { return first_##name(x); }
FIRST(exp)
FIRST(exp2)
#endif
