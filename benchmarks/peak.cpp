// What a core can do at most: products and sums of floats in registers, in vectors as wide as the flags allow.
#include <cstring>

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef float V __attribute__((vector_size(4 * LANES)));

// A product and a sum in each lane of twelve vectors, `rounds` times: 24 LANES rounds FLOP.
extern "C" double multiply_add(long rounds, const float* factor) {
    V sums[12], a, b;
    std::memcpy(&a, factor, sizeof(a));
    std::memcpy(&b, factor + LANES, sizeof(b));
    for (int k = 0; k < 12; ++k) sums[k] = a * static_cast<float>(k);
    for (long n = 0; n < rounds; ++n)
#pragma GCC unroll 12
        for (int k = 0; k < 12; ++k) sums[k] = sums[k] * a + b;
    V all = {};
    for (int k = 0; k < 12; ++k) all += sums[k];
    return all[0];
}
extern "C" long lanes() { return LANES; }
