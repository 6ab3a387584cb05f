// What a newer compiler would take from a newer system than torch's wheels need (glibc 2.28, libstdc++ of GCC 8),
// defined here: the library then loads wherever torch does.

#include <sstream>

// std::stringstream(), which torch's headers call, is exported by libstdc++ since GCC 9.
template std::basic_ostringstream<char>::basic_ostringstream();
template std::basic_stringstream<char>::basic_stringstream();

// Asked by std::shared_ptr, in glibc since 2.32. False is right everywhere: it then counts atomically.
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = false;
}
