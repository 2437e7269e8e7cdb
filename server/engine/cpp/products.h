// Small products of attention, whose sums stay in registers.

#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "numbers.h"

namespace {

// The left side of a product: number i of line g.
struct Lines {
    const float* numbers;
    int64_t line_stride, number_stride;
    float at(int64_t g, int64_t i) const { return numbers[g * line_stride + i * number_stride]; }
    Lines from(int64_t g) const { return {numbers + g * line_stride, line_stride, number_stride}; }
};

// Written as vectors: of a loop over an array the compiler keeps not all sums in registers.
constexpr int64_t VECTOR = 16;
typedef float Vector __attribute__((vector_size(4 * VECTOR)));
typedef uint16_t HalfWords __attribute__((vector_size(2 * VECTOR)));
typedef uint32_t Words __attribute__((vector_size(4 * VECTOR)));

inline Vector load_vector(const float* from) {
    Vector vector;
    std::memcpy(&vector, from, sizeof vector);
    return vector;
}

inline Vector load_vector(const BFloat16* from) {
    HalfWords bits;
    std::memcpy(&bits, from, sizeof bits);
    return std::bit_cast<Vector>(__builtin_convertvector(bits, Words) << 16);
}

// Lines whose sums for 32 columns fit into the registers there are, with room for a line of each.
#ifdef __AVX512F__
constexpr int MOST_LINES = 8;
#else
constexpr int MOST_LINES = 3;
#endif

// GROUP lines of x and NUM vectors of columns of `multiply`.
template <int GROUP, int NUM, typename T>
inline void multiply_block(Lines x, int64_t num_in, const T* matrix, int64_t stride, float* out,
                           int64_t out_stride) {
    Vector sums[GROUP][NUM] = {};
    for (int64_t i = 0; i < num_in; ++i) {
        const T* line = matrix + i * stride;
        Vector columns[NUM];
        for (int j = 0; j < NUM; ++j) columns[j] = load_vector(line + j * VECTOR);
        __builtin_prefetch(line + NUM * VECTOR);  // of the next block: lines lie far apart
        for (int g = 0; g < GROUP; ++g)
            for (int j = 0; j < NUM; ++j) sums[g][j] += x.at(g, i) * columns[j];
    }
    for (int g = 0; g < GROUP; ++g)
        std::memcpy(out + g * out_stride, sums[g], sizeof sums[g]);
}

// Of `num` columns, fewer than a vector: as one that is filled up, so that every sum is made in the
// same order whatever GROUP is.
template <int GROUP, typename T>
void multiply_rest(Lines x, int64_t num_in, const T* matrix, int64_t stride, int64_t num,
                   float* out, int64_t out_stride) {
    Vector sums[GROUP] = {};
    T line[VECTOR] = {};
    for (int64_t i = 0; i < num_in; ++i) {
        std::memcpy(line, matrix + i * stride, num * sizeof(T));
        const Vector columns = load_vector(line);
        for (int g = 0; g < GROUP; ++g) sums[g] += x.at(g, i) * columns;
    }
    for (int g = 0; g < GROUP; ++g)
        std::memcpy(out + g * out_stride, &sums[g], num * sizeof(float));
}

// out (GROUP, num_out) = x (GROUP, num_in) times matrix (num_in, num_out).
template <int GROUP, typename T>
void multiply_lines(Lines x, int64_t num_in, const T* matrix, int64_t stride, int64_t num_out,
                    float* out, int64_t out_stride) {
    int64_t j = 0;
    if constexpr (2 * GROUP <= MOST_LINES)  // few lines leave registers for more columns
        for (; j + 4 * VECTOR <= num_out; j += 4 * VECTOR)
            multiply_block<GROUP, 4>(x, num_in, matrix + j, stride, out + j, out_stride);
    for (; j + 2 * VECTOR <= num_out; j += 2 * VECTOR)
        multiply_block<GROUP, 2>(x, num_in, matrix + j, stride, out + j, out_stride);
    for (; j + VECTOR <= num_out; j += VECTOR)
        multiply_block<GROUP, 1>(x, num_in, matrix + j, stride, out + j, out_stride);
    if (j < num_out)
        multiply_rest<GROUP>(x, num_in, matrix + j, stride, num_out - j, out + j, out_stride);
}

// The same of any number of lines, several at once, so that the matrix is read less often.
template <typename T, int GROUP = MOST_LINES>
void multiply(int64_t num, Lines x, int64_t num_in, const T* matrix, int64_t stride,
              int64_t num_out, float* out, int64_t out_stride) {
    int64_t first = 0;
    for (; first + GROUP <= num; first += GROUP)
        multiply_lines<GROUP>(x.from(first), num_in, matrix, stride, num_out,
                              out + first * out_stride, out_stride);
    if constexpr (GROUP > 1)
        if (first < num)
            multiply<T, GROUP - 1>(num - first, x.from(first), num_in, matrix, stride, num_out,
                                   out + first * out_stride, out_stride);
}

}  // namespace
