// The one symbol that std::vector takes from a libstdc++ newer than manylinux_2_28 allows (GLIBCXX_3.4.29). With the
// symbol defined here, the libstdc++ that torch loads anyway is enough for the library.

#include <new>

#ifdef __GLIBCXX__
namespace std {
__attribute__((noreturn, visibility("hidden"))) void __throw_bad_array_new_length() { throw bad_alloc(); }
}  // namespace std
#endif
