// How the C ABI reports a failure: it returns -1 or nullptr, and the caller takes a message.
#pragma once
#include <c10/util/Exception.h>

#include <cstdlib>
#include <cstring>

inline thread_local char *last_error = nullptr;
inline void set_error(const char *message) {
  free(last_error);
  last_error = strdup(message);
}
inline char *take_error() {
  char *e = last_error;
  last_error = nullptr;
  return e;
}
#define TRY(fail, ...)                     \
  try {                                    \
    __VA_ARGS__                            \
  } catch (const c10::Error &e) {          \
    set_error(e.what_without_backtrace()); \
    return fail;                           \
  } catch (const std::exception &e) {      \
    set_error(e.what());                   \
    return fail;                           \
  } catch (...) {                          \
    set_error("unknown C++ exception");    \
    return fail;                           \
  }
