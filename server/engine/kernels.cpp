// What lies between the matrix products of a decode step: one token of each row, one call each.
//
// As torch operations these are some forty a layer, most of whose time is the calling. The stream
// is float32; T, of products, keys and values, is float or bfloat16, and all sums are float32.
// Built by kernels.py for the processor that runs it. NaN and infinity stay what they are.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <vector>

namespace {

struct BFloat16 {
    uint16_t bits;
};

inline float load(float x) { return x; }
inline float load(BFloat16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }

inline void store(float* to, float x) { *to = x; }

inline void store(BFloat16* to, float x) {  // to the nearest, ties to even
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    to->bits = x == x ? uint16_t(rounded) : uint16_t(0x7fc0);
}

// e^x within 2e-7 of itself, for x that is clamped to what float32 holds; a loop of it becomes
// vector instructions, which the library's own does not. Polynomial: Cephes' expf.
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    const float nearest = std::floor(x * 1.44269504f + 0.5f);
    const float whole = nearest == nearest ? nearest : 0.0f;
    // Explicit, since sums may be reordered: the two parts of log 2 must not become one.
    const float r = std::fma(whole, 2.12194440e-4f, std::fma(-whole, 0.693359375f, x));
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * std::bit_cast<float>(uint32_t(int32_t(whole) + 127) << 23);
}

// Below so many multiplications a second core costs more than it saves.
constexpr int64_t WORTH_SHARING = 64 * 1024;

// hidden += added, where there is one; out = hidden's RMS norm times weight. All (rows, size).
template <typename T>
void add_and_norm(int64_t rows, int64_t size, float* hidden, const T* added, const float* weight,
                  float eps, T* out) {
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

// GROUP lines of x and SIZE columns of `multiply`, whose sums stay in registers.
template <int GROUP, int SIZE, typename T>
inline void multiply_block(const float* x, int64_t x_stride, int64_t num_in, const T* matrix,
                           int64_t stride, float* out, int64_t out_stride) {
    float sums[GROUP][SIZE] = {};
    for (int64_t i = 0; i < num_in; ++i) {
        const T* line = matrix + i * stride;
        if (SIZE == 32) __builtin_prefetch(line + SIZE);  // of the next block: lines lie far apart
        for (int g = 0; g < GROUP; ++g)
            for (int j = 0; j < SIZE; ++j) sums[g][j] += x[g * x_stride + i] * load(line[j]);
    }
    for (int g = 0; g < GROUP; ++g)
        for (int j = 0; j < SIZE; ++j) out[g * out_stride + j] = sums[g][j];
}

// out (GROUP, num_out) = x (GROUP, num_in) times matrix (num_in, num_out); what is behind each
// other in them lies their strides apart.
template <int GROUP, typename T>
void multiply_lines(const float* x, int64_t x_stride, int64_t num_in, const T* matrix,
                    int64_t stride, int64_t num_out, float* out, int64_t out_stride) {
    int64_t j = 0;
    for (; j + 32 <= num_out; j += 32)
        multiply_block<GROUP, 32>(x, x_stride, num_in, matrix + j, stride, out + j, out_stride);
    for (; j + 8 <= num_out; j += 8)
        multiply_block<GROUP, 8>(x, x_stride, num_in, matrix + j, stride, out + j, out_stride);
    for (; j < num_out; ++j)
        multiply_block<GROUP, 1>(x, x_stride, num_in, matrix + j, stride, out + j, out_stride);
}

// The same of any number of lines, several at once, so that the matrix is read less often.
template <typename T>
void multiply(int64_t group, const float* x, int64_t x_stride, int64_t num_in, const T* matrix,
              int64_t stride, int64_t num_out, float* out, int64_t out_stride) {
    constexpr decltype(&multiply_lines<1, T>) of[] = {multiply_lines<1, T>, multiply_lines<2, T>,
                                                      multiply_lines<3, T>, multiply_lines<4, T>};
    for (int64_t g = 0; g < group;) {
        const int64_t num = std::min<int64_t>(group - g, std::size(of));
        of[num - 1](x + g * x_stride, x_stride, num_in, matrix, stride, num_out,
                    out + g * out_stride, out_stride);
        g += num;
    }
}

inline void softmax(float* scores, int64_t num) {
    float largest = scores[0];
    for (int64_t t = 1; t < num; ++t) largest = scores[t] > largest ? scores[t] : largest;
    float sum = 0.0f;
    for (int64_t t = 0; t < num; ++t) {
        scores[t] = exponential(scores[t] - largest);
        sum += scores[t];
    }
    const float scale = 1.0f / sum;
    for (int64_t t = 0; t < num; ++t) scores[t] *= scale;
}

// One number of a head, rotated: sin's first half is negated already.
template <typename T>
inline float rotated(const T* head, const T* cos, const T* sin, int64_t i, int64_t dim) {
    const int64_t partner = i < dim / 2 ? i + dim / 2 : i - dim / 2;
    return load(head[i]) * load(cos[i]) + load(head[partner]) * load(sin[i]);
}

// Rotate a row's query heads and its key head, store its key and value behind its `length` tokens,
// and attend: for the `group` query heads of one key head. keys (dim, width), values (width, dim).
template <typename T>
void attend_head(int64_t group, int64_t dim, int64_t width, int64_t length, const T* query,
                 const T* key, const T* value, const T* cos, const T* sin, T* keys, T* values,
                 float scaling, T* out) {
    // Scores of whole blocks: those of tokens that are not there are made and not looked at.
    const int64_t num = length + 1, num_made = std::min(width, (num + 31) / 32 * 32);
    thread_local std::vector<float> queries, scores, sums;
    queries.resize(group * dim);
    scores.resize(group * num_made);
    sums.resize(group * dim);
    for (int64_t i = 0; i < dim; ++i) {
        store(&keys[i * width + length], rotated(key, cos, sin, i, dim));
        values[length * dim + i] = value[i];
    }
    for (int64_t g = 0; g < group; ++g)
        for (int64_t i = 0; i < dim; ++i)
            queries[g * dim + i] = scaling * rotated(query + g * dim, cos, sin, i, dim);
    multiply(group, queries.data(), dim, dim, keys, width, num_made, scores.data(), num_made);
    for (int64_t g = 0; g < group; ++g) softmax(scores.data() + g * num_made, num);
    multiply(group, scores.data(), num_made, num, values, dim, dim, sums.data(), dim);
    for (int64_t i = 0; i < group * dim; ++i) store(&out[i], sums[i]);
}

// qkv (rows, (heads * group + 2 * heads) * dim), cos and sin (rows, dim), lengths (rows,): tokens
// before this one; keys (rows, heads, dim, width), values (rows, heads, width, dim)
// -> out (rows, heads * group * dim). Returns 1, having done nothing, where a length is none.
template <typename T>
int attend(int64_t rows, int64_t heads, int64_t group, int64_t dim, int64_t width,
           const int64_t* lengths, const T* qkv, const T* cos, const T* sin, T* keys, T* values,
           float scaling, T* out) {
    int64_t num_tokens = 0;
    for (int64_t row = 0; row < rows; ++row) {
        if (lengths[row] < 0 || lengths[row] >= width) return 1;
        num_tokens += lengths[row] + 1;
    }
    const int64_t num_queries = heads * group * dim;
#pragma omp parallel for collapse(2) if (2 * num_tokens * num_queries > WORTH_SHARING)
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t head = 0; head < heads; ++head) {
            const T* query = qkv + row * (num_queries + 2 * heads * dim);
            const T* key = query + num_queries + head * dim;
            const int64_t place = (row * heads + head) * dim * width;
            const int64_t first = head * group * dim;
            attend_head(group, dim, width, lengths[row], query + first, key, key + heads * dim,
                        cos + row * dim, sin + row * dim, keys + place, values + place, scaling,
                        out + row * num_queries + first);
        }
    return 0;
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
    }

EXPORT(float, float32)
EXPORT(BFloat16, bfloat16)
