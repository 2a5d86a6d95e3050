#include <stdarg.h>
#include <stdio.h>

#include "gqa_internal.h"

static __thread char last_error[768];

gqa_status gqa_fail(gqa_status status, char const* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(last_error, sizeof last_error, format, arguments);
  va_end(arguments);
  return status;
}

gqa_status gqa_fail_range(char const* what, long long got, long long from, long long to) {
  return gqa_fail(GQA_ERROR_INVALID_VALUE,
                  "config: %s: got %lld; allowed: %lld to %lld. Nothing was launched.", what, got,
                  from, to);
}

gqa_status gqa_fail_in_driver(gqa_driver const* driver, gqa_cu_result error, gqa_status status,
                              char const* doing, char const* what) {
  char const* name = NULL;
  char const* text = NULL;
  driver->error_name(error, &name);
  driver->error_text(error, &text);
  return gqa_fail(status, "%s %s: %s (%s). Nothing was launched.", doing, what,
                  name == NULL ? "unknown error" : name, text == NULL ? "no description" : text);
}

char const* gqa_last_error(void) { return last_error; }

char const* gqa_status_name(gqa_status status) {
  static char const* const names[] = {"GQA_SUCCESS",
                                      "GQA_ERROR_NULL_POINTER",
                                      "GQA_ERROR_INVALID_VALUE",
                                      "GQA_ERROR_CACHE_OVERFLOW",
                                      "GQA_ERROR_UNSUPPORTED",
                                      "GQA_ERROR_WORKSPACE",
                                      "GQA_ERROR_NO_DRIVER",
                                      "GQA_ERROR_DEVICE",
                                      "GQA_ERROR_LAUNCH",
                                      "GQA_ERROR_UNSUPPORTED_FEATURE"};
  int const index = (int)status;
  int const count = (int)(sizeof names / sizeof names[0]);
  return index >= 0 && index < count ? names[index] : "unknown status";
}
