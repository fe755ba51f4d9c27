// The one symbol that std::vector takes from a libstdc++ newer than manylinux_2_28 allows (GLIBCXX_3.4.29). Defined
// here, the library needs no more of libstdc++ than the one that torch loads has anyway.

#include <new>

#ifdef __GLIBCXX__
namespace std {
__attribute__((noreturn, visibility("hidden"))) void __throw_bad_array_new_length() { throw bad_alloc(); }
}  // namespace std
#endif
