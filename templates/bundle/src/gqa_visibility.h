// What the library's files share among themselves is no symbol of a shared library.
#ifndef GQA_VISIBILITY_H_
#define GQA_VISIBILITY_H_

#ifndef GQA_INTERNAL
#define GQA_INTERNAL __attribute__((visibility("hidden")))
#endif

#endif  // GQA_VISIBILITY_H_
