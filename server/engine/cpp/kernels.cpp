// What lies between the matrix products of a pass: one call each for all of its tokens.
//
// As torch operations these are some forty a layer and more for prompts, and in a decode step most
// of their time is the calling. The stream is float32; T, of products, keys and values, is float or
// bfloat16, and all sums are float32. Built by kernels.py for the processor that runs it. NaN and
// infinity stay what they are.

#include <cmath>
#include <cstdint>

#include "attention.h"
#include "numbers.h"

namespace {

// hidden += added, where there is one; out = hidden's RMS norm times weight. All (rows, size).
template <typename T>
void add_and_norm(int64_t rows, int64_t size, float* hidden, const T* added, const float* weight,
                  float eps, T* out) {
#pragma omp parallel for if (rows * size > WORTH_SHARING)
    for (int64_t row = 0; row < rows; ++row) {
        float* h = hidden + row * size;
        if (added != nullptr)
            for (int64_t i = 0; i < size; ++i) h[i] += load(added[row * size + i]);
        float squares = 0.0f;
        for (int64_t i = 0; i < size; ++i) squares += h[i] * h[i];
        const float scale = 1.0f / std::sqrt(squares / float(size) + eps);
        for (int64_t i = 0; i < size; ++i) store(&out[row * size + i], h[i] * scale * weight[i]);
    }
}

// hidden += added, of `num` numbers.
template <typename T>
void add(int64_t num, float* hidden, const T* added) {
#pragma omp parallel for if (num > WORTH_SHARING)
    for (int64_t i = 0; i < num; ++i) hidden[i] += load(added[i]);
}

// silu(gate) * up: gate_up (rows, 2 * size), gate before up -> out (rows, size).
template <typename T>
void silu_and_multiply(int64_t rows, int64_t size, const T* gate_up, T* out) {
#pragma omp parallel for if (8 * rows * size > WORTH_SHARING)
    for (int64_t row = 0; row < rows; ++row) {
        const T *gate = gate_up + row * 2 * size, *up = gate + size;
        for (int64_t i = 0; i < size; ++i) {
            const float x = load(gate[i]);
            store(&out[row * size + i], x / (1.0f + exponential(-x)) * load(up[i]));
        }
    }
}

}  // namespace

#define EXPORT(T, name)                                                                            \
    extern "C" void add_and_norm_##name(int64_t rows, int64_t size, float* hidden, const T* added, \
                                        const float* weight, float eps, T* out) {                  \
        add_and_norm(rows, size, hidden, added, weight, eps, out);                                 \
    }                                                                                              \
    extern "C" void add_##name(int64_t num, float* hidden, const T* added) {                       \
        add(num, hidden, added);                                                                   \
    }                                                                                              \
    extern "C" void silu_and_multiply_##name(int64_t rows, int64_t size, const T* gate_up,         \
                                             T* out) {                                             \
        silu_and_multiply(rows, size, gate_up, out);                                               \
    }                                                                                              \
    extern "C" int attend_##name(int64_t rows, int64_t heads, int64_t group, int64_t dim,          \
                                 int64_t width, const int64_t* lengths, const T* qkv,              \
                                 const T* cos, const T* sin, T* keys, T* values, float scaling,    \
                                 T* out) {                                                         \
        return attend(rows, heads, group, dim, width, lengths, qkv, cos, sin, keys, values,        \
                      scaling, out);                                                               \
    }                                                                                              \
    extern "C" int attend_chunks_##name(int64_t num_chunks, int64_t tokens, int64_t heads,         \
                                        int64_t group, int64_t dim, int64_t layer,                 \
                                        const Chunk<T>* chunks, const T* qkv, const T* cos,        \
                                        const T* sin, float scaling, T* out) {                     \
        return attend_chunks<T>({tokens, heads, group, dim, layer, qkv, cos, sin, scaling, out},   \
                                num_chunks, chunks);                                               \
    }

EXPORT(float, float32)
EXPORT(BFloat16, bfloat16)
