// Number formats, and e^x, for loops that become vector instructions.

#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

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

}  // namespace
