// What lies between the matrix products of a pass: one call each for all of its tokens.
//
// As torch operations these are some forty a layer and more for prompts, and in a decode step most
// of their time is the calling. The stream is float32; T, of products, keys and values, is float or
// bfloat16, and all sums are float32. Built by kernels.py for the processor that runs it. NaN and
// infinity stay what they are.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
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
    for (; j < num_out; ++j)
        for (int g = 0; g < GROUP; ++g) {
            float sum = 0.0f;
            for (int64_t i = 0; i < num_in; ++i) sum += x.at(g, i) * load(matrix[i * stride + j]);
            out[g * out_stride + j] = sum;
        }
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

// A head (dim,), rotated and scaled: sin's first half is negated already.
template <typename T>
inline void rotate(const T* head, const T* cos, const T* sin, int64_t dim, float scale, float* out) {
    const int64_t half = dim / 2;
    for (int64_t i = 0; i < half; ++i)
        out[i] = scale * (load(head[i]) * load(cos[i]) + load(head[i + half]) * load(sin[i]));
    for (int64_t i = half; i < dim; ++i)
        out[i] = scale * (load(head[i]) * load(cos[i]) + load(head[i - half]) * load(sin[i]));
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
    rotate(key, cos, sin, dim, 1.0f, sums.data());
    for (int64_t i = 0; i < dim; ++i) store(&keys[i * width + length], sums[i]);
    std::copy_n(value, dim, values + length * dim);
    for (int64_t g = 0; g < group; ++g)
        rotate(query + g * dim, cos, sin, dim, scaling, queries.data() + g * dim);
    multiply(group, {queries.data(), dim, 1}, dim, keys, width, num_made, scores.data(), num_made);
    for (int64_t g = 0; g < group; ++g) softmax(scores.data() + g * num_made, num);
    multiply(group, {scores.data(), num_made, 1}, num, values, dim, dim, sums.data(), dim);
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

// Tokens [start, start + num) of a prompt, which lie from `first` on among a pass' tokens.
// memory (layers, 2, heads, room, dim): the prompt's keys and values.
template <typename T>
struct Chunk {
    int64_t first, num, start, room;
    T* memory;
};

// Heads of tokens that attend together, so that each key and value is read once for all of them.
constexpr int64_t MOST_HEADS = 48;

// Attention of `num` tokens of a prompt behind `start` others: the `group` query heads of one key
// head, each of which is a line; keys and values (start + num, dim). A token's query heads lie
// `stride` behind those of the token before, and what they come to out_stride in out.
template <typename T>
void attend_tokens(int64_t num, int64_t start, int64_t group, int64_t dim, const T* query,
                   int64_t stride, const T* cos, const T* sin, const T* keys, const T* values,
                   float scaling, T* out, int64_t out_stride) {
    constexpr int64_t KEYS = 64;
    const int64_t num_keys = start + num, num_lines = group * num;
    const int64_t width = (num_lines + VECTOR - 1) / VECTOR * VECTOR;  // whole vectors; lines that are none are zeros
    thread_local std::vector<float> head, queries, block, scores, largest, sums, products;
    head.resize(dim);
    queries.assign(dim * width, 0.0f);
    block.resize(KEYS * dim);
    scores.resize(num_keys * width);
    for (int64_t line = 0; line < num_lines; ++line) {
        const int64_t token = line / group;
        rotate(query + token * stride + line % group * dim, cos + token * dim, sin + token * dim,
               dim, scaling, head.data());
        for (int64_t i = 0; i < dim; ++i) queries[i * width + line] = head[i];
    }
    for (int64_t first = 0; first < num_keys; first += KEYS) {
        const int64_t size = std::min(KEYS, num_keys - first);
        for (int64_t i = 0; i < size * dim; ++i) block[i] = load(keys[first * dim + i]);
        multiply(size, {block.data(), dim, 1}, dim, queries.data(), width, width,
                 scores.data() + first * width, width);
    }
    // Softmax down each line, over the keys up to its token's own.
    largest.assign(width, -INFINITY);
    sums.assign(width, 0.0f);
    const auto first_line = [&](int64_t key) { return std::max<int64_t>(key - start, 0) * group; };
    for (int64_t key = 0; key < num_keys; ++key) {
        const float* line = scores.data() + key * width;
        for (int64_t j = first_line(key); j < width; ++j)
            largest[j] = line[j] > largest[j] ? line[j] : largest[j];
    }
    for (int64_t key = 0; key < num_keys; ++key) {
        float* line = scores.data() + key * width;
        std::fill_n(line, first_line(key), 0.0f);
        for (int64_t j = first_line(key); j < width; ++j) {
            line[j] = exponential(line[j] - largest[j]);
            sums[j] += line[j];
        }
    }
    products.resize(num_lines * dim);
    multiply(num_lines, {scores.data(), 1, width}, num_keys, values, dim, dim, products.data(), dim);
    for (int64_t line = 0; line < num_lines; ++line) {
        const float scale = 1.0f / sums[line];
        T* to = out + line / group * out_stride + line % group * dim;
        for (int64_t i = 0; i < dim; ++i) store(&to[i], scale * products[line * dim + i]);
    }
}

// Rotate and store what the chunks bring at a layer, and attend, each token of a prompt to those
// up to itself. qkv (tokens, (heads * group + 2 * heads) * dim), cos and sin (tokens, dim), out
// (tokens, heads * group * dim). Returns 1, having done nothing, where a chunk has no room.
template <typename T>
int attend_chunks(int64_t num_chunks, int64_t tokens, int64_t heads, int64_t group, int64_t dim,
                  int64_t layer, const Chunk<T>* chunks, const T* qkv, const T* cos, const T* sin,
                  float scaling, T* out) {
    const int64_t num_queries = heads * group * dim, stride = num_queries + 2 * heads * dim;
    const int64_t most = std::max<int64_t>(MOST_HEADS / group, 1);
    struct Part {
        const Chunk<T>* chunk;
        int64_t head, first, end;
    };
    std::vector<Part> heads_of, parts;  // of chunks; the tokens that attend together
    for (const Chunk<T>* chunk = chunks; chunk < chunks + num_chunks; ++chunk) {
        if (chunk->start < 0 || chunk->num < 0 || chunk->start + chunk->num > chunk->room) return 1;
        if (chunk->first < 0 || chunk->first + chunk->num > tokens) return 1;
        for (int64_t head = 0; head < heads; ++head) {
            heads_of.push_back({chunk, head, 0, chunk->num});
            for (int64_t at = 0; at < chunk->num; at += most)
                parts.push_back({chunk, head, at, std::min(at + most, chunk->num)});
        }
    }
    const auto keys_of = [&](const Part& part) {
        return part.chunk->memory + (2 * layer * heads + part.head) * part.chunk->room * dim;
    };
#pragma omp parallel
    {
#pragma omp for
        for (size_t number = 0; number < heads_of.size(); ++number) {
            const Part& part = heads_of[number];
            T* keys = keys_of(part) + part.chunk->start * dim;
            T* values = keys + heads * part.chunk->room * dim;
            thread_local std::vector<float> rotated;
            rotated.resize(dim);
            for (int64_t at = 0; at < part.end; ++at) {
                const int64_t token = part.chunk->first + at;
                const T* key = qkv + token * stride + num_queries + part.head * dim;
                rotate(key, cos + token * dim, sin + token * dim, dim, 1.0f, rotated.data());
                for (int64_t i = 0; i < dim; ++i) store(&keys[at * dim + i], rotated[i]);
                std::copy_n(key + heads * dim, dim, values + at * dim);
            }
        }
#pragma omp for schedule(dynamic)
        for (size_t number = 0; number < parts.size(); ++number) {
            const Part& part = parts[number];
            const int64_t token = part.chunk->first + part.first, place = part.head * group * dim;
            const T* keys = keys_of(part);
            attend_tokens(part.end - part.first, part.chunk->start + part.first, group, dim,
                          qkv + token * stride + place, stride, cos + token * dim,
                          sin + token * dim, keys, keys + heads * part.chunk->room * dim, scaling,
                          out + token * num_queries + place, num_queries);
        }
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
    }                                                                                              \
    extern "C" int attend_chunks_##name(int64_t num_chunks, int64_t tokens, int64_t heads,         \
                                        int64_t group, int64_t dim, int64_t layer,                 \
                                        const Chunk<T>* chunks, const T* qkv, const T* cos,        \
                                        const T* sin, float scaling, T* out) {                     \
        return attend_chunks(num_chunks, tokens, heads, group, dim, layer, chunks, qkv, cos, sin,  \
                             scaling, out);                                                        \
    }

EXPORT(float, float32)
EXPORT(BFloat16, bfloat16)
