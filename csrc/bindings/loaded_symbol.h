// Functions of libraries that the extension is not linked with.
#pragma once
#include <dlfcn.h>

namespace llmcore {

// What `library`, if the process has loaded it, exports under this name; else what anybody does; or null. Python loads
// torch's libraries outside the global scope, so a symbol of one that none of ours depends on (a linker drops those
// that nothing refers to) is found by the library's name alone.
inline void* loaded_symbol(const char* library, const char* symbol) {
  void* const handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
  return dlsym(handle ? handle : RTLD_DEFAULT, symbol);
}

}  // namespace llmcore
