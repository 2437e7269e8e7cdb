// Rotation, storing and attention: of a token of each row, and of chunks of prompts.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "numbers.h"
#include "products.h"

namespace {

// A head (dim,), rotated and scaled: sin's first half is negated already.
template <typename T>
inline void rotate(const T* head, const T* cos, const T* sin, int64_t dim, float scale,
                   float* out) {
    const int64_t half = dim / 2;
    for (int64_t i = 0; i < half; ++i)
        out[i] = scale * (load(head[i]) * load(cos[i]) + load(head[i + half]) * load(sin[i]));
    for (int64_t i = half; i < dim; ++i)
        out[i] = scale * (load(head[i]) * load(cos[i]) + load(head[i - half]) * load(sin[i]));
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

// Softmax down the columns of scores (num_keys, width). Column j is a query head of token
// start + j / group, which sees the keys up to itself; the others become 0. Left unscaled: by sums.
inline void softmax_columns(float* scores, int64_t num_keys, int64_t width, int64_t start,
                            int64_t group, float* largest, float* sums) {
    std::fill_n(largest, width, -INFINITY);
    std::fill_n(sums, width, 0.0f);
    const auto first = [&](int64_t key) { return std::max<int64_t>(key - start, 0) * group; };
    for (int64_t key = 0; key < num_keys; ++key) {
        const float* line = scores + key * width;
        for (int64_t j = first(key); j < width; ++j)
            largest[j] = line[j] > largest[j] ? line[j] : largest[j];
    }
    for (int64_t key = 0; key < num_keys; ++key) {
        float* line = scores + key * width;
        std::fill_n(line, first(key), 0.0f);
        for (int64_t j = first(key); j < width; ++j) {
            line[j] = exponential(line[j] - largest[j]);
            sums[j] += line[j];
        }
    }
}

// scores (num_keys, width) = keys (num_keys, dim) times queries (dim, width).
template <typename T>
void score(const T* keys, int64_t num_keys, int64_t dim, const float* queries, int64_t width,
           float* scores) {
    constexpr int64_t BLOCK = 64;
    thread_local std::vector<float> block;
    block.resize(BLOCK * dim);
    for (int64_t first = 0; first < num_keys; first += BLOCK) {
        const int64_t num = std::min(BLOCK, num_keys - first);
        for (int64_t i = 0; i < num * dim; ++i) block[i] = load(keys[first * dim + i]);
        multiply(num, {block.data(), dim, 1}, dim, queries, width, width, scores + first * width,
                 width);
    }
}

// Attention of `num` tokens of a prompt behind `start` others: the `group` query heads of one key
// head, each of which is a column; keys and values (start + num, dim). A token's query heads lie
// `stride` behind those of the token before, and what they come to out_stride in out.
template <typename T>
void attend_tokens(int64_t num, int64_t start, int64_t group, int64_t dim, const T* query,
                   int64_t stride, const T* cos, const T* sin, const T* keys, const T* values,
                   float scaling, T* out, int64_t out_stride) {
    const int64_t num_keys = start + num, num_heads = group * num;
    const int64_t width = (num_heads + VECTOR - 1) / VECTOR * VECTOR;  // more are columns of zeros
    thread_local std::vector<float> head, queries, scores, largest, sums, products;
    head.resize(dim);
    queries.assign(dim * width, 0.0f);
    scores.resize(num_keys * width);
    largest.resize(width);
    sums.resize(width);
    products.resize(num_heads * dim);
    for (int64_t j = 0; j < num_heads; ++j) {
        const int64_t token = j / group;
        rotate(query + token * stride + j % group * dim, cos + token * dim, sin + token * dim, dim,
               scaling, head.data());
        for (int64_t i = 0; i < dim; ++i) queries[i * width + j] = head[i];
    }
    score(keys, num_keys, dim, queries.data(), width, scores.data());
    softmax_columns(scores.data(), num_keys, width, start, group, largest.data(), sums.data());
    multiply(num_heads, {scores.data(), 1, width}, num_keys, values, dim, dim, products.data(),
             dim);
    for (int64_t j = 0; j < num_heads; ++j) {
        const float scale = 1.0f / sums[j];
        T* to = out + j / group * out_stride + j % group * dim;
        for (int64_t i = 0; i < dim; ++i) store(&to[i], scale * products[j * dim + i]);
    }
}

// Tokens [first, end) of a chunk, for one key head.
template <typename T>
struct Part {
    const Chunk<T>* chunk;
    int64_t head, first, end;
};

// What the parts of a pass have in common, at a layer: see attend_chunks.
template <typename T>
struct ChunkPass {
    int64_t tokens, heads, group, dim, layer;
    const T *qkv, *cos, *sin;
    float scaling;
    T* out;

    int64_t num_queries() const { return heads * group * dim; }
    int64_t stride() const { return num_queries() + 2 * heads * dim; }

    T* keys_of(const Part<T>& part) const {
        return part.chunk->memory + (2 * layer * heads + part.head) * part.chunk->room * dim;
    }
    T* values_of(const Part<T>& part) const {
        return keys_of(part) + heads * part.chunk->room * dim;
    }

    // Rotate its keys, and store them and its values.
    void keep(const Part<T>& part) const {
        thread_local std::vector<float> rotated;
        rotated.resize(dim);
        for (int64_t at = part.first; at < part.end; ++at) {
            const int64_t token = part.chunk->first + at, place = (part.chunk->start + at) * dim;
            const T* key = qkv + token * stride() + num_queries() + part.head * dim;
            rotate(key, cos + token * dim, sin + token * dim, dim, 1.0f, rotated.data());
            T* to = keys_of(part) + place;
            for (int64_t i = 0; i < dim; ++i) store(&to[i], rotated[i]);
            std::copy_n(key + heads * dim, dim, values_of(part) + place);
        }
    }

    void attend(const Part<T>& part) const {
        const int64_t token = part.chunk->first + part.first, place = part.head * group * dim;
        attend_tokens(part.end - part.first, part.chunk->start + part.first, group, dim,
                      qkv + token * stride() + place, stride(), cos + token * dim,
                      sin + token * dim, keys_of(part), values_of(part), scaling,
                      out + token * num_queries() + place, num_queries());
    }
};

// Rotate and store what the chunks bring at a layer, and attend, each token of a prompt to those
// up to itself. qkv (tokens, (heads * group + 2 * heads) * dim), cos and sin (tokens, dim), out
// (tokens, heads * group * dim). Returns 1, having done nothing, where a chunk has no room or lies
// outside of the tokens.
template <typename T>
int attend_chunks(const ChunkPass<T>& pass, int64_t num_chunks, const Chunk<T>* chunks) {
    const int64_t most = std::max<int64_t>(MOST_HEADS / pass.group, 1);
    std::vector<Part<T>> wholes, parts;
    for (const Chunk<T>* chunk = chunks; chunk < chunks + num_chunks; ++chunk) {
        if (chunk->start < 0 || chunk->num < 0 || chunk->start + chunk->num > chunk->room) return 1;
        if (chunk->first < 0 || chunk->first + chunk->num > pass.tokens) return 1;
        for (int64_t head = 0; head < pass.heads; ++head) {
            wholes.push_back({chunk, head, 0, chunk->num});
            for (int64_t at = 0; at < chunk->num; at += most)
                parts.push_back({chunk, head, at, std::min(at + most, chunk->num)});
        }
    }
#pragma omp parallel
    {
#pragma omp for
        for (size_t number = 0; number < wholes.size(); ++number) pass.keep(wholes[number]);
        // All are stored here.
#pragma omp for schedule(dynamic)
        for (size_t number = 0; number < parts.size(); ++number) pass.attend(parts[number]);
    }
    return 0;
}

}  // namespace
