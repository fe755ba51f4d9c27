// The replay of a captured decode step: its kernels one after another, without an interpreter between them.
#include "lanes.h"

extern "C" {

struct WeftCall {
    int (*kernel)(const void *record);
    const void *record;
};

// Records of 64-bit numbers (see capture.py). Ends at the first kernel that returns a status other than OK.
struct WeftReplay {
    const WeftCall *calls;
    int64_t count;
};

int weft_replay(const WeftReplay *given) {
    for (int64_t n = 0; n < given->count; n++)
        if (int status = given->calls[n].kernel(given->calls[n].record)) return status;
    return weft::OK;
}

}  // extern "C"
