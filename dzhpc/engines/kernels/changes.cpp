// Changes on their way through a network, for many coordinates at once: convolutions, and the passes between them.
//
// Changes D lie in memory as [P, C, H, W, B], those of one channel as [P, H, W, B]: with the batch innermost every step is one of
// whole vectors, whatever the number of channels and the size of the images, and a shift or a stride moves a pointer. Written in
// the vector extensions of GCC and Clang. Sums of a coordinate are made in an order that depends neither on the coordinates beside
// it nor on the number of threads.

#include <stdlib.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
#define PAIRS  // products of two numbers of 16 bits, twice as fast as those of floats
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;  // NEON, SSE
#endif
typedef float V __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef int32_t Wholes __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
using Half = uint16_t;  // bfloat16

constexpr long SLICE = 128;  // of the batch: what is worked on at once
constexpr long RUN = 1024;   // values in a tile of one channel

inline V all(float x) { return x - V{}; }  // x + 0 would be an operation: -0 + 0 is 0
inline V largest(V changing, V fixed) { return fixed > changing ? fixed : changing; }  // NaN of the first stays
inline V smallest(V a, V b) { return a < b ? a : b; }

#define INLINE __attribute__((always_inline)) inline
#define APART __attribute__((noinline))  // registers of its own

template <class To, class From>
INLINE To as(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

inline V widened(Halves h) {
#ifdef PAIRS  // GCC 12 makes two halves of it
    return as<V>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(as<__m256i>(h)), 16));
#else
    return as<V>(__builtin_convertvector(h, Bits) << 16);
#endif
}

inline Halves rounded(V v) {  // to the nearest, to even
#ifdef PAIRS
    return as<Halves>(_mm512_cvtneps_pbh(as<__m512>(v)));
#else
    const Bits bits = as<Bits>(v), up = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Bits nan = as<Bits>(v != v);
    return __builtin_convertvector((up & ~nan) | ((bits >> 16 | 0x40) & nan), Halves);
#endif
}

inline V load(const float* p) {
    V v;
    std::memcpy(&v, p, sizeof(v));
    return v;
}
inline V load(const Half* p) {
    Halves h;
    std::memcpy(&h, p, sizeof(h));
    return widened(h);
}
inline void store(float* p, V v) { std::memcpy(p, &v, sizeof(v)); }
inline void store(Half* p, V v) {
    const Halves h = rounded(v);
    std::memcpy(p, &h, sizeof(h));
}

// The first `count` lanes only; the others are zero.
template <class T>
inline V load(const T* p, long count) {
    if (count >= LANES) return load(p);
    T part[LANES] = {};
    std::memcpy(part, p, count * sizeof(T));
    return load(part);
}
template <class T>
inline void store(T* p, V v, long count) {
    if (count >= LANES) return store(p, v);
    T part[LANES];
    store(part, v);
    std::memcpy(p, part, count * sizeof(T));
}

// The same where `all` lanes are wanted, or none of them: without a branch where a processor has masks.
#ifdef PAIRS
inline unsigned mask(bool all, long count) { return !all ? 0 : count >= LANES ? (1u << LANES) - 1 : (1u << count) - 1; }
INLINE V load_if(bool all, const Half* p, long count) {
    return widened(as<Halves>(_mm256_maskz_loadu_epi16(mask(all, count), p)));
}
INLINE V load_if(bool all, const float* p, long count) { return as<V>(_mm512_maskz_loadu_ps(mask(all, count), p)); }
#else
template <class T>
INLINE V load_if(bool all, const T* p, long count) {
    return all ? load(p, count) : V{};
}
#endif

inline double total(V v) {
    float lanes[LANES];
    store(lanes, v);
    double sum = 0;
    for (float x : lanes) sum += x;
    return sum;
}

template <class T>
struct Scratch {  // zeros, aligned for vectors
    T* data;
    explicit Scratch(long count) {
        const size_t bytes = (count * sizeof(T) + 127) / 64 * 64;
        data = static_cast<T*>(std::aligned_alloc(64, bytes));
        std::memset(data, 0, bytes);
    }
    Scratch(const Scratch&) = delete;
    ~Scratch() { std::free(data); }
};

// part(begin, end) of [0, count) on so many threads.
template <class Part>
void parallel(long count, long threads, const Part& part) {
    const long parts = std::max(1L, std::min(threads, count));
    std::vector<std::thread> others;
    for (long k = 1; k < parts; ++k) others.emplace_back([&, k] { part(count * k / parts, count * (k + 1) / parts); });
    part(0, count / parts);
    for (auto& t : others) t.join();
}

// What a BatchNorm needs: sums of D and D (2 x_c + D), in vectors.
struct Sums {
    V plain = {}, crossed = {};
};

// Memory on its way to the second cache. GCC takes a call of what only asks for memory for one without effect.
template <class T>
INLINE void await(const T* from, long values) {
    for (long k = 0; from && k < values; k += 64 / sizeof(T)) __builtin_prefetch(from + k, 0, 2);
}

template <class D, class X>
inline void add_up(const D* d, const X* centred, long count, V factor, Sums& sums) {
    V plain[4] = {}, crossed[4] = {};
    long k = 0;
    for (; k + 4 * LANES <= count; k += 4 * LANES)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const V x = load(centred + k + i * LANES), v = load(d + k + i * LANES) * factor;
            plain[i] += v;
            crossed[i] += v * (x + x + v);
        }
    for (; k < count; k += LANES) {
        const V x = load(centred + k, count - k), v = load(d + k, count - k) * factor;
        plain[0] += v;
        crossed[0] += v * (x + x + v);
    }
    sums.plain += (plain[0] + plain[1]) + (plain[2] + plain[3]);
    sums.crossed += (crossed[0] + crossed[1]) + (crossed[2] + crossed[3]);
}

// ---------------------------------------------------------------------------------------------------------------- convolutions

struct Convolution {
    int64_t coords, batch, channels, height, width, outputs, rows, columns;  // rows, columns: of the outputs
    int64_t tall, wide, down, right, dilate_down, dilate_right, top, left;   // kernel, stride, dilation, zeros before
    int64_t threads;
    const void *images, *centred;  // [P, C, H, W, B], [O, H', W', B] or null
    const float* kernels;
    void* outs;     // [P, O, H', W', B]
    double* sums;  // [P, O, slices, 2], filled with `centred`
};

inline long slices_of(long batch, long slice) { return (batch + slice - 1) / slice; }

constexpr int PANEL = 8, WIDE = 32;  // outputs, samples of which a product is made at once
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int OUTS = 8;  // outputs times two vectors are sums in registers
#else
constexpr int OUTS = 4;
#endif

// What a product adds to a sum. Of floats; of pairs of channels, that are bfloat16 or whole numbers, in the bits of a float.
// BLOCK: channels, or pairs, of which sums are made before they become floats; 0: all.
struct Floats {
    static constexpr int CHANNELS = 1, BLOCK = 0;
    static V add(V sum, const float* weight, V column) { return sum + all(*weight) * column; }
    static V made(V sum) { return sum; }
};
#ifdef PAIRS
struct Rounded {
    static constexpr int CHANNELS = 2, BLOCK = 0;
    static V add(V sum, const float* weight, V column) {
        const __m512i w = _mm512_set1_epi32(as<int>(*weight));
        return as<V>(_mm512_dpbf16_ps(as<__m512>(sum), as<__m512bh>(column), as<__m512bh>(w)));
    }
    static V made(V sum) { return sum; }
};
struct Whole {
    static constexpr int CHANNELS = 2, BLOCK = 32;
    static V add(V sum, const float* weight, V column) {
        const __m512i w = _mm512_set1_epi32(as<int>(*weight));
        asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(column), "v"(w));  // by its C name GCC 12 keeps every sum twice
        return sum;
    }
    static V made(V sum) { return __builtin_convertvector(as<Wholes>(sum), V); }
};
#else
using Rounded = Floats;
using Whole = Floats;
#endif
constexpr long MANY = 16;  // channels from which on whole numbers are worth making
template <class T, class Narrow>
using ProductOf = std::conditional_t<std::is_same<T, Half>::value, Narrow, Floats>;

// out[o][v] = sum over c of kernel[c][o] * column[c][v], for OUT outputs and COUNT vectors that lie one behind the other; on top
// of what is there, if `more`.
template <class Product, int OUT, int COUNT>
inline void multiply(const float* kernel, const float* columns, long depth, bool more, float* out) {
    V sum[OUT][COUNT] = {};
    for (long c = 0; c < depth; ++c, columns += WIDE, kernel += PANEL) {
        V column[COUNT];
#pragma GCC unroll 2
        for (int v = 0; v < COUNT; ++v) column[v] = load(columns + v * LANES);
#pragma GCC unroll 8
        for (int o = 0; o < OUT; ++o)
#pragma GCC unroll 2
            for (int v = 0; v < COUNT; ++v) sum[o][v] = Product::add(sum[o][v], kernel + o, column[v]);
    }
#pragma GCC unroll 8
    for (int o = 0; o < OUT; ++o)
#pragma GCC unroll 2
        for (int v = 0; v < COUNT; ++v) {
            float* to = out + o * WIDE + v * LANES;
            const V made = Product::made(sum[o][v]);
            store(to, Product::BLOCK && more ? load(to) + made : made);
        }
}

template <class Product, int COUNT>
inline void multiply(const float* kernel, const float* columns, long depth, long outputs, bool more, float* out) {
    if (OUTS == PANEL && outputs > 4) return multiply<Product, OUTS, COUNT>(kernel, columns, depth, more, out);
    for (long o = 0; o < std::min<long>(PANEL, outputs); o += 4)
        multiply<Product, 4, COUNT>(kernel + o, columns, depth, more, out + o * WIDE);
}

// The first panel of `outputs` [depth, PANEL] times columns [depth, WIDE], of which `lanes` count -> [PANEL, WIDE].
template <class Product>
inline void product(const float* kernel, const float* columns, long depth, long outputs, long lanes, float* out) {
    const long block = Product::BLOCK ? Product::BLOCK : depth;
    for (long c = 0; c < depth; c += block) {
        const float *from = columns + c * WIDE, *of = kernel + c * PANEL;
        const long some = std::min(block, depth - c);
        long b = 0;
        for (; b + LANES < lanes; b += 2 * LANES) multiply<Product, 2>(of, from + b, some, outputs, c > 0, out + b);
        if (b < lanes) multiply<Product, 1>(of, from + b, some, outputs, c > 0, out + b);
    }
}

// Transformed tiles lie so far apart that they do not fall into the same places of a cache.
inline long apart(long values) { return values + 64; }

// B' d of Winograd's F(4 x 4, 3 x 3), for one row or column of six.
INLINE void transform(const V d[6], V out[6]) {
    const V a = d[4] - d[2] * 4, b = d[3] - d[1] * 4, c = d[4] - d[2], e = (d[3] - d[1]) * 2;
    out[0] = d[0] * 4 - d[2] * 5 + d[4];
    out[1] = a + b;
    out[2] = a - b;
    out[3] = c + e;
    out[4] = c - e;
    out[5] = d[1] * 4 - d[3] * 5 + d[5];
}

// A' m.
INLINE void transform_back(const V m[6], V out[4]) {
    const V a = m[1] + m[2], b = m[1] - m[2], c = m[3] + m[4], e = m[3] - m[4];
    out[0] = m[0] + a + c;
    out[1] = b + e * 2;
    out[2] = a + c * 4;
    out[3] = b + e * 8 + m[5];
}

inline long filled(long lanes) { return (lanes + LANES - 1) / LANES * LANES; }

INLINE void transform_row(const V columns[6][6], int i, V out[6]) {
    const V line[6] = {columns[0][i], columns[1][i], columns[2][i], columns[3][i], columns[4][i], columns[5][i]};
    transform(line, out);
}

// B' d B of tiles of all channels, in floats: columns [slice / WIDE, 36, C, WIDE].
template <class T>
struct FloatTiles {
    const Convolution& s;
    const long step;  // floats from one of the 36 frequencies to the next
    Scratch<float> columns;
    const T* image = nullptr;
    long lanes = 0;

    FloatTiles(const Convolution& s, long slice) : s(s), step(apart(s.channels * WIDE)), columns(slice / WIDE * 36 * step) {}
    void start(const T* from, long count) { image = from, lanes = count; }
    void take_rows(long) {}
    const float* units(long) const { return nullptr; }

    APART void make(long y, long x) {  // of the tile whose first output is at (y, x)
        const long plane = s.height * s.width * s.batch, above = y - s.top, before = x - s.left, apart = step;
        long places[6][6];
        bool inside[6][6];
        for (int i = 0; i < 6; ++i)
            for (int j = 0; j < 6; ++j) {
                inside[i][j] = above + i >= 0 && above + i < s.height && before + j >= 0 && before + j < s.width;
                places[i][j] = inside[i][j] ? ((above + i) * s.width + before + j) * s.batch : 0;
            }
        for (long c = 0; c < s.channels; ++c)
            for (long b = 0; b < lanes; b += LANES) {
                V w[6][6];
#pragma GCC unroll 6
                for (int j = 0; j < 6; ++j) {
                    V d[6];
#pragma GCC unroll 6
                    for (int i = 0; i < 6; ++i) {
                        const T* from = image + c * plane + b + places[i][j];
                        d[i] = load_if(inside[i][j], from, lanes - b);
                        if (j > 1) __builtin_prefetch(from + plane);  // columns 0 and 1 were the last tile's
                    }
                    transform(d, w[j]);  // w[j][i]: column j
                }
                float* to = columns.data + b / WIDE * 36 * step + c * WIDE + b % WIDE;
#pragma GCC unroll 6
                for (int i = 0; i < 6; ++i) {
                    V out[6];
                    transform_row(w, i, out);
#pragma GCC unroll 6
                    for (int j = 0; j < 6; ++j) store(to + (i * 6 + j) * apart, out[j]);
                }
            }
    }
};

#ifdef PAIRS
constexpr float STEPS = 16383;                // whole numbers of a transformed value: 14 bits and a sign
constexpr long BOUNDS = 16;                   // bounds of a tile
constexpr int BOUND[6] = {0, 1, 1, 2, 2, 3};  // rows of B that are alike but for signs have one

// The absolute values of B' times those of d, its four rows that differ.
INLINE void bound(const V d[6], V out[4]) {
    out[0] = d[0] * 4 + d[2] * 5 + d[4];
    out[1] = (d[1] + d[2]) * 4 + (d[3] + d[4]);
    out[2] = (d[1] + d[3]) * 2 + (d[2] + d[4]);
    out[3] = d[1] * 4 + d[3] * 5 + d[5];
}

// Some rows of an image of halves and the zeros around it, in pairs of channels: [held, slice / WIDE, C / 2, W', WIDE]; row r of
// the image with its border is at r % held.
struct Rows {
    typedef uint16_t Both __attribute__((vector_size(64)));
    const Convolution& s;
    const long held, slice, depth, width;
    Scratch<float> pairs;
    Scratch<Half> sizes;  // the largest magnitude in all channels [held, slice / WIDE, W', WIDE]; NaN above all
    const Half* image = nullptr;
    long lanes = 0, taken = 0;

    Rows(const Convolution& s, long slice, long held, long width)
        : s(s), held(held), slice(slice), depth((s.channels + 1) / 2), width(width), pairs(held * slice * depth * width),
          sizes(held * slice * width) {}
    float* row(long r, long b) { return pairs.data + (r % held * (slice / WIDE) + b / WIDE) * depth * width * WIDE; }
    Half* size(long r, long b) { return sizes.data + (r % held * (slice / WIDE) + b / WIDE) * width * WIDE; }
    void start(const Half* from, long count) { image = from, lanes = count, taken = 0; }

    void take(long end) {  // rows before `end`, of which the last `held` stay
        for (; taken < end; ++taken)
            for (long b = 0; b < lanes; b += WIDE) {
                std::memset(size(taken, b), 0, width * WIDE * sizeof(Half));
                if (taken >= s.top && taken < s.top + s.height)
                    take_block(taken, b);
                else
                    std::memset(row(taken, b), 0, depth * width * WIDE * sizeof(float));
            }
    }

    void take_block(long r, long b) {
        Bits places;  // of 16 pairs: of the first's halves, 0 to 31, and the second's
        for (uint32_t v = 0; v < LANES; ++v) places[v] = v | (v + WIDE) << 16;
        const __m512i low = as<__m512i>(places), high = as<__m512i>(places + 0x100010);
        const long pixel = s.batch, plane = s.height * s.width * pixel, count = std::min<long>(WIDE, lanes - b);
        const long pixels = s.width, channels = s.channels, line = width * WIDE;
        const Half* from = image + (r - s.top) * s.width * pixel + b;
        float* pair = row(r, b) + s.left * WIDE;
        Half* const tops = size(r, b) + s.left * WIDE;
        for (long c = 0; c < channels; c += 2, from += 2 * plane, pair += line) {
            float* to = pair;
            Half* top = tops;
            const bool two = c + 1 < channels;
            for (long x = 0; x < pixels; ++x, to += WIDE, top += WIDE) {
                Both even = {}, odd = {}, most;
                const Half* at = from + x * pixel;
                if (two && count == WIDE) {
                    std::memcpy(&even, at, sizeof(even));
                    std::memcpy(&odd, at + plane, sizeof(odd));
                } else {
                    std::memcpy(&even, at, count * sizeof(Half));
                    if (two) std::memcpy(&odd, at + plane, count * sizeof(Half));
                }
                __builtin_prefetch(at + 2 * plane, 0, 2);
                __builtin_prefetch(at + 3 * plane, 0, 2);
                std::memcpy(&most, top, sizeof(most));
                const Both a = even & 0x7fff, o = odd & 0x7fff, larger = a > o ? a : o;
                most = larger > most ? larger : most;
                std::memcpy(top, &most, sizeof(most));
                store(to, as<V>(_mm512_permutex2var_epi16(as<__m512i>(even), low, as<__m512i>(odd))));
                store(to + LANES, as<V>(_mm512_permutex2var_epi16(as<__m512i>(even), high, as<__m512i>(odd))));
            }
        }
    }
};

// The same in whole numbers, pairs of channels: columns [slice / WIDE, 36, C / 2, WIDE]. No value of a frequency and sample is
// larger than STEPS, and one means a unit, [slice / WIDE, BOUNDS, WIDE].
struct WholeTiles {
    const Convolution& s;
    const long step;
    Rows rows;
    Scratch<float> columns, unit, scale;

    WholeTiles(const Convolution& s, long slice)
        : s(s), step(apart((s.channels + 1) / 2 * WIDE)), rows(s, slice, 6, (s.columns + 3) / 4 * 4 + 2),
          columns(slice / WIDE * 36 * step), unit(slice * BOUNDS), scale(slice * BOUNDS) {}
    void start(const Half* from, long count) { rows.start(from, count); }
    void take_rows(long y) { rows.take(y + 6); }
    const float* units(long b) const { return unit.data + b * BOUNDS; }

    void find_units(long y, long x, long b) {  // NaN and infinity leave as NaN
        V w[6][4];
        for (int j = 0; j < 6; ++j) {
            V d[6];
            for (int i = 0; i < 6; ++i) d[i] = load(rows.size(y + i, b) + (x + j) * WIDE + b % WIDE);
            bound(d, w[j]);
        }
        for (int i = 0; i < 4; ++i) {
            const V line[6] = {w[0][i], w[1][i], w[2][i], w[3][i], w[4][i], w[5][i]};
            V tops[4];
            bound(line, tops);
            for (int j = 0; j < 4; ++j) {
                const V top = largest(tops[j], all(1e-30f));
                const long to = (b / WIDE * BOUNDS + i * 4 + j) * WIDE + b % WIDE;
                store(unit.data + to, top * all(1 / STEPS) + (top - top));
                store(scale.data + to, all(STEPS) / top);
            }
        }
    }

    APART void make(long y, long x) {
        const V magic = all(12582912.0f);  // 1.5 2^23: the last bits of a sum with it are the whole number
        const long apart = step, line = rows.width * WIDE, depth = rows.depth;
        for (long b = 0; b < rows.lanes; b += LANES) {
            find_units(y, x, b);
            const float *from[6], *scales = scale.data + b / WIDE * BOUNDS * WIDE + b % WIDE;
            for (int i = 0; i < 6; ++i) from[i] = rows.row(y + i, b) + x * WIDE + b % WIDE;
            float* to = columns.data + b / WIDE * 36 * apart + b % WIDE;
            for (long c = 0, at = 0; c < depth; ++c, to += WIDE, at += line) {
                V even[6][6], odd[6][6];
#pragma GCC unroll 6
                for (int j = 0; j < 6; ++j) {
                    V d[6], e[6];
#pragma GCC unroll 6
                    for (int i = 0; i < 6; ++i) {
                        const Bits both = as<Bits>(load(from[i] + at + j * WIDE));
                        d[i] = as<V>(both << 16), e[i] = as<V>(both & 0xffff0000);
                    }
                    transform(d, even[j]);
                    transform(e, odd[j]);
                }
#pragma GCC unroll 6
                for (int i = 0; i < 6; ++i) {
                    V low[6], high[6];
                    transform_row(even, i, low);
                    transform_row(odd, i, high);
#pragma GCC unroll 6
                    for (int j = 0; j < 6; ++j) {
                        const V times = load(scales + (BOUND[i] * 4 + BOUND[j]) * WIDE);
                        const Bits first = as<Bits>(low[j] * times + magic), second = as<Bits>(high[j] * times + magic);
                        store(to + (i * 6 + j) * apart, as<V>((first & 0xffff) | second << 16));
                    }
                }
            }
        }
    }
};
#else
using WholeTiles = FloatTiles<Half>;
#endif

// Values of one output that leave together: up to SIDE x SIDE pixels (FULL: all), one vector each; with `centred` their sums are
// added up.
template <int SIDE, bool FULL, class T>
INLINE void leave(const Convolution& s, T* out, const T* centred, long high, long wide, long count, const V values[SIDE][SIDE],
                  Sums& sums) {
    const long pixel = s.batch, row = s.columns * pixel;  // what is stored might be s, as far as a compiler knows
    const bool summed = s.centred;
    V plain = {}, crossed = {};
#pragma GCC unroll 4
    for (long i = 0; i < SIDE; ++i) {
        if (!FULL && i >= high) break;
#pragma GCC unroll 4
        for (long j = 0; j < SIDE; ++j) {
            if (!FULL && j >= wide) break;
            store(out + i * row + j * pixel, values[i][j], FULL ? LANES : count);
            if (!summed) continue;
            const V c = load(centred + i * row + j * pixel, FULL ? LANES : count);
            plain += values[i][j];
            crossed += values[i][j] * (c + c + values[i][j]);
        }
    }
    sums.plain += plain;
    sums.crossed += crossed;
}

// Where `pixels` neighbouring values of one output leave: asked for while their products are made, since memory is not read on
// for long enough in a tile to be foreseen.
template <class T>
INLINE void await(const T* out, const T* centred, long pixel, long pixels, long lanes) {
    for (long j = 0; j < pixels; ++j) {
        await(out + j * pixel, lanes);
        if (centred) await(centred + j * pixel, lanes);
    }
}

// Rows of all channels, asked for bit by bit while others are worked on: runs of a slice are too short to be foreseen.
template <class T>
struct Ahead {
    const T* from;
    long plane, pixel, run, lanes, left, pixels = 0;  // channels that are left, pixels of the one at hand

    Ahead(const Convolution& s, const T* image, long row, long rows, long lanes)
        : from(image + row * s.width * s.batch), plane(s.height * s.width * s.batch), pixel(s.batch), run(rows * s.width),
          lanes(lanes), left(image && run > 0 ? s.channels : 0) {}
    void ask(long count) {
        for (; count > 0 && left; --count) {
            await(from + pixels * pixel, lanes);
            if (++pixels == run) pixels = 0, from += plane, --left;
        }
    }
};

constexpr long FREQUENCY = PANEL * WIDE + 16;  // floats from one of the 36 products to the next

// The outputs of a panel that begins with o, at (y, x), of `lanes` (WIDE at most) samples that begin with `first`.
// units: of whole numbers [BOUNDS, WIDE]; of: the panel's own, of its outputs' [36, PANEL].
template <class Product, class T>
APART void transform_panel(const Convolution& s, const float* products, const float* units, const float* of, long p, long o,
                     long y, long x, long first, long lanes, Sums* sums) {
    const long high = std::min(4L, s.rows - y), wide = std::min(4L, s.columns - x), count = std::min<long>(PANEL, s.outputs - o);
    const long plane = s.rows * s.columns * s.batch, at = o * plane + (y * s.columns + x) * s.batch + first;
    T* out = static_cast<T*>(s.outs) + p * s.outputs * plane + at;
    const T* centred = static_cast<const T*>(s.centred) + at;
    for (long k = 0; k < count; ++k, out += plane, centred += plane, products += WIDE)
        for (long b = 0; b < lanes; b += LANES) {
            V r[4][6], values[4][4];
#pragma GCC unroll 6
            for (int j = 0; j < 6; ++j) {
                V m[6], back[4];
#pragma GCC unroll 6
                for (int i = 0; i < 6; ++i) {
                    m[i] = load(products + (i * 6 + j) * FREQUENCY + b);
#ifdef PAIRS
                    if constexpr (Product::CHANNELS == 2)
                        m[i] *= load(units + (BOUND[i] * 4 + BOUND[j]) * WIDE + b) * all(of[(i * 6 + j) * PANEL + k]);
#endif
                }
                transform_back(m, back);
                for (int i = 0; i < 4; ++i) r[i][j] = back[i];
            }
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) transform_back(r[i], values[i]);
            if (high == 4 && wide == 4 && lanes - b >= LANES)
                leave<4, true>(s, out + b, centred + b, 4, 4, LANES, values, sums[k]);
            else
                leave<4, false>(s, out + b, centred + b, high, wide, lanes - b, values, sums[k]);
        }
}

// Samples that are worked on at once: the columns [depth, lanes] that products are made of stay in the second cache.
inline long slice_for(long depth) {
    long lanes = SLICE;
    while (lanes > WIDE && depth * lanes * 4 > 320 * 1024) lanes /= 2;
    return lanes;
}
template <class T>
inline long winograd_slice(const Convolution& s) {
    const bool whole = s.channels >= MANY && ProductOf<T, Whole>::CHANNELS == 2;  // rows of the image are held beside the columns
    return whole ? WIDE : slice_for(36 * s.channels);
}
inline long direct_slice(const Convolution& s) { return slice_for(s.tall * s.wide * s.channels); }

inline void write_sums(const Convolution& s, long p, long slice, long slices, const std::vector<Sums>& sums) {
    for (long o = 0; s.centred && o < s.outputs; ++o) {
        double* to = s.sums + ((p * s.outputs + o) * slices + slice) * 2;
        to[0] = total(sums[o].plain), to[1] = total(sums[o].crossed);
    }
}

template <class Product, class T>
void winograd_by(const Convolution& s) {
    constexpr bool whole = Product::CHANNELS == 2;
    const long depth = whole ? (s.channels + 1) / 2 : s.channels, panel = 36 * (depth + whole) * PANEL;
    const long slice = winograd_slice<T>(s), slices = slices_of(s.batch, slice), plane = s.height * s.width * s.batch;
    const long pixel = s.batch, line = s.columns * pixel, area = s.rows * line;
    const T* centred = static_cast<const T*>(s.centred);
    parallel(s.coords * slices, s.threads, [=, &s](long begin, long end) {
        std::conditional_t<whole, WholeTiles, FloatTiles<T>> tiles(s, slice);
        Scratch<float> products(36 * FREQUENCY);
        std::vector<Sums> sums(s.outputs);
        const auto image_of = [&](long k) {
            return static_cast<const T*>(s.images) + k / slices * s.channels * plane + k % slices * slice;
        };
        for (long k = begin; k < end; ++k) {
            const long p = k / slices, first = k % slices * slice, lanes = std::min(slice, s.batch - first), full = filled(lanes);
            const T* image = image_of(k);
            const T* out = static_cast<const T*>(s.outs) + p * s.outputs * area;
            std::fill(sums.begin(), sums.end(), Sums());
            tiles.start(image, lanes);
            for (long y = 0; y < s.rows; y += 4) {
                tiles.take_rows(y);
                const bool last = y + 4 >= s.rows;
                const T* next = last ? (k + 1 < end ? image_of(k + 1) : nullptr) : image;
                const long from = last ? 0 : std::max(0L, y + 6 - s.top), to = std::min(s.height, (last ? 6 : y + 10) - s.top);
                Ahead<T> ahead(s, next, from, to - from, std::min(lanes, s.batch - (k + 1) % slices * slice));
                const long calls = (s.columns + 3) / 4 * ((s.outputs + PANEL - 1) / PANEL) * ((full + WIDE - 1) / WIDE) * 36;
                const long share = (ahead.run * s.channels + calls - 1) / calls;
                const long high = std::min(4L, s.rows - y);
                for (long x = 0; x < s.columns; x += 4) {
                    const long across = std::min(4L, s.columns - x);
                    tiles.make(y, x);
                    for (long o = 0; o < s.outputs; o += PANEL)
                        for (long b = 0; b < full; b += WIDE) {
                            const long wide = std::min<long>(WIDE, full - b), count = std::min<long>(PANEL, s.outputs - o);
                            const float* kernels = s.kernels + o / PANEL * panel;
                            const float* columns = tiles.columns.data + b / WIDE * 36 * tiles.step;
                            const float* of = kernels + 36 * depth * PANEL;
                            const long at = o * area + y * line + x * pixel + first + b;
                            for (long n = 0; n < 36; ++n) {
                                const long from = at + n / 4 * area + n % 4 * line;
                                if (n / 4 < count && n % 4 < high)
                                    await(out + from, centred ? centred + from : nullptr, pixel, across, wide);
                                if (LANES == 16) ahead.ask(share);  // narrower products take so long that memory keeps up
                                product<Product>(kernels + n * depth * PANEL, columns + n * tiles.step, depth, count, wide,
                                                 products.data + n * FREQUENCY);
                            }
                            transform_panel<Product, T>(s, products.data, tiles.units(b), of, p, o, y, x, first + b,
                                                        std::min(wide, lanes - b), &sums[o]);
                        }
                }
            }
            write_sums(s, p, k % slices, slices, sums);
        }
    });
}

template <class T>
void winograd(const Convolution& s) {
    if (s.channels >= MANY) return winograd_by<ProductOf<T, Whole>, T>(s);
    winograd_by<Floats, T>(s);
}

// [lanes / WIDE, kh kw C, WIDE]: what the outputs at (y, x) are made of, zeros beyond the image.
template <class Product, class T>
void gather(const Convolution& s, const T* image, long y, long x, long lanes, long depth, float* columns) {
    const long pixel = s.batch, row = s.width * pixel, plane = s.height * row, channels = s.channels, next = s.right * pixel;
    for (long i = 0; i < s.tall; ++i)
        for (long j = 0; j < s.wide; ++j) {
            const long h = y * s.down + i * s.dilate_down - s.top, w = x * s.right + j * s.dilate_right - s.left;
            const bool inside = h >= 0 && h < s.height && w >= 0 && w < s.width;
            const T* from = image + (inside ? h * row + w * pixel : 0);
            for (long c = 0; c < channels; c += Product::CHANNELS, from += Product::CHANNELS * plane, columns += WIDE)
                for (long b = 0; b < lanes; b += LANES) {
                    V value = inside ? load(from + b, lanes - b) : V{};
                    __builtin_prefetch(from + next + b);  // of the next outputs
                    if constexpr (Product::CHANNELS == 2) {
                        const bool two = c + 1 < channels;
                        value = as<V>(as<Bits>(value) >> 16 | as<Bits>(inside && two ? load(from + plane + b, lanes - b) : V{}));
                        if (two) __builtin_prefetch(from + plane + next + b);
                    }
                    store(columns + b / WIDE * depth * WIDE + b % WIDE, value);
                }
        }
}

template <class T>
void direct(const Convolution& s) {
    using Product = ProductOf<T, Rounded>;
    const long slice = direct_slice(s), slices = slices_of(s.batch, slice);
    const long depth = s.tall * s.wide * ((s.channels + Product::CHANNELS - 1) / Product::CHANNELS);
    const long plane = s.height * s.width * s.batch, area = s.rows * s.columns * s.batch;
    const bool summed = s.centred;
    parallel(s.coords * slices, s.threads, [=, &s](long begin, long end) {
        Scratch<float> columns(depth * slice), products(PANEL * WIDE);
        std::vector<Sums> sums(s.outputs);
        for (long k = begin; k < end; ++k) {
            const long p = k / slices, first = k % slices * slice, lanes = std::min(slice, s.batch - first), full = filled(lanes);
            const T* image = static_cast<const T*>(s.images) + p * s.channels * plane + first;
            std::fill(sums.begin(), sums.end(), Sums());
            for (long y = 0; y < s.rows; ++y) {
                const long from = std::max(0L, y * s.down + (s.tall - 1) * s.dilate_down + 1 - s.top);
                const long to = y + 1 < s.rows ? std::min(s.height, from + s.down) : from;
                Ahead<T> ahead(s, image, from, to - from, lanes);
                const long calls = s.columns * ((s.outputs + PANEL - 1) / PANEL) * ((full + WIDE - 1) / WIDE);
                const long share = (ahead.run * s.channels + calls - 1) / calls;
                for (long x = 0; x < s.columns; ++x) {
                    gather<Product>(s, image, y, x, lanes, depth, columns.data);
                    for (long o = 0; o < s.outputs; o += PANEL)
                        for (long b = 0; b < full; b += WIDE) {
                            const long wide = std::min<long>(WIDE, full - b), count = std::min<long>(PANEL, s.outputs - o);
                            const long at = o * area + (y * s.columns + x) * s.batch + first + b;
                            T* out = static_cast<T*>(s.outs) + p * s.outputs * area + at;
                            const T* centred = static_cast<const T*>(s.centred) + at;
                            for (long n = 0; n < count; ++n)
                                await(out + n * area, summed ? centred + n * area : nullptr, 0, 1, wide);
                            if (LANES == 16) ahead.ask(share);
                            product<Product>(s.kernels + o * depth, columns.data + b * depth, depth, s.outputs - o, wide, products.data);
                            for (long n = 0; n < count; ++n)
                                for (long v = 0; v < wide; v += LANES) {
                                    const V values[1][1] = {{load(products.data + n * WIDE + v)}};
                                    const long to = n * area + v;
                                    leave<1, false>(s, out + to, centred + to, 1, 1, lanes - b - v, values, sums[o + n]);
                                }
                        }
                }
            }
            write_sums(s, p, k % slices, slices, sums);
        }
    });
}

// ---------------------------------------------------------------------------------------------------------------------- passes

// [BatchNorm] [+ residual] [ReLU] [max pool] [mean over pixels] of changes, in one pass, or two with sums.
struct Pass {
    int64_t coords, batch, channels, height, width, pool, rows, columns;  // rows, columns: of what leaves
    int64_t source;        // 0: dense changes; 1: planes, one channel of each coordinate; 2: planes through a convolution
    int64_t row, column;   // of planes: elements from one row, one pixel to the next
    int64_t tall, wide, down, right, dilate_down, dilate_right, top, left, plane_height, plane_width;  // of the convolution
    int64_t normalised, relu, mean, residual;  // residual: 0 none, 1 dense, 2 one channel
    int64_t threads;
    double factor, count;     // planes are multiplied by it; values in a mean over batch and pixels
    const int64_t* offsets;   // of each plane [P]
    const int64_t* channel;   // of each plane, where it is no convolution's
    const int64_t* residual_channel;
    const void* data;         // dense [P, C, H, W, B], or what planes are parts of
    const float* kernels;     // [P, k, C]
    const void* centred;      // x_c [C, H, W, B]
    const void* value;        // before the ReLU and the pool [C, H, W, B]; with a pool less what it leaves
    const void* left_over;    // with ReLU and pool: what leaves them at theta [C, H', W', B]
    const void* residuals;
    const float *scale, *gamma;  // s and the layer's factor [C]
    const double* means;         // [P, C, 2] or null: sums are made
    void* outs;                  // [P, (C,) H', W', B], with `mean` floats [P, (C,) B]
};

struct Coefficients {
    float own, shift, shrink;  // own D + shift - shrink x_c
};

inline Coefficients coefficients(double mean, double crossed, double s, double gamma) {
    const double dv = crossed - mean * mean, s2 = std::sqrt(s * s + dv);
    return {float(gamma / s2), float(-mean * gamma / s2), float(gamma * dv / ((s2 + s) * s * s2))};
}

// One row of a convolution of a plane that is padded already: `count` neighbouring values.
template <int SIZE>
inline void convolved_run(const float* from, const long* places, const float* weights, long size, long count, float* out) {
    V w[SIZE ? SIZE : 1];
    long own[SIZE ? SIZE : 1];  // what is stored might be `places`, as far as a compiler knows
    for (int k = 0; k < SIZE; ++k) w[k] = all(weights[k]), own[k] = places[k];
    const auto at = [&](long b, auto read) {
        V sum = {};
        if (SIZE)
#pragma GCC unroll 9
            for (int k = 0; k < SIZE; ++k) sum += w[k] * read(from + own[k] + b);
        else
            for (long k = 0; k < size; ++k) sum += all(weights[k]) * read(from + places[k] + b);
        return sum;
    };
    long b = 0;
    for (; SIZE && b + 4 * LANES <= count; b += 4 * LANES) {  // four sums, so that none waits for itself
        V sum[4] = {};
#pragma GCC unroll 9
        for (int k = 0; k < SIZE; ++k)
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) sum[i] += w[k] * load(from + own[k] + b + i * LANES);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) store(out + b + i * LANES, sum[i]);
    }
    for (; b + LANES <= count; b += LANES) store(out + b, at(b, [](const float* p) { return load(p); }));
    if (b < count) store(out + b, at(b, [&](const float* p) { return load(p, count - b); }), count - b);
}

// Changes of some coordinates [begin, end) and a slice of the batch.
template <class D, class O, class X>
struct Worker {
    const Pass& s;
    long begin, end, first, lanes;
    std::vector<long> places;   // of a convolution's weights in a padded plane
    Scratch<float> planes, rows;
    long plane, line;           // floats of a padded plane, and of its row

    Worker(const Pass& s, long begin, long end, long first, long lanes)
        : s(s), begin(begin), end(end), first(first), lanes(lanes),
          planes(s.source == 2 ? (end - begin) * padded_height(s) * padded_width(s) * lanes + LANES : 0),
          rows(s.source == 2 ? std::max(RUN, s.pool * s.pool * lanes) + LANES : 0),
          plane(padded_height(s) * padded_width(s) * lanes), line(padded_width(s) * lanes) {
        if (s.source != 2) return;
        for (long i = 0; i < s.tall; ++i)
            for (long j = 0; j < s.wide; ++j) places.push_back(i * s.dilate_down * line + j * s.dilate_right * lanes);
        for (long p = begin; p < end; ++p)
            for (long h = 0; h < s.plane_height; ++h)
                for (long w = 0; w < s.plane_width; ++w) {
                    const float* from = static_cast<const float*>(s.data) + s.offsets[p] + h * s.row + w * s.column + first;
                    float* to = planes.data + (p - begin) * plane + (h + s.top) * line + (w + s.left) * lanes;
                    std::memcpy(to, from, lanes * sizeof(float));
                }
    }
    static long padded_height(const Pass& s) {
        return std::max(s.plane_height + s.top, (s.height - 1) * s.down + (s.tall - 1) * s.dilate_down + 1);
    }
    static long padded_width(const Pass& s) {
        return std::max(s.plane_width + s.left, (s.width - 1) * s.right + (s.wide - 1) * s.dilate_right + 1);
    }

    long own_channels() const { return s.source == 1 ? 1 : s.channels; }
    long channel(long p, long c) const { return s.source == 1 ? s.channel[p] : c; }

    // Changes of pixels [x, x + count) of a row: where they begin; they lie `step` elements apart.
    const D* changes(long p, long c, long h, long x, long count, long& step, float* buffer) const {
        if (s.source == 2) {
            step = lanes;
            const float* from = planes.data + (p - begin) * plane + h * s.down * line + x * s.right * lanes;
            const long size = s.tall * s.wide;
            const float* weights = s.kernels + (p * s.channels + c) * size;
            const long runs = s.right == 1 ? 1 : count, run = count / runs * lanes;
            for (long k = 0; k < runs; ++k) {
                const float* at = from + k * s.right * lanes;
                if (size == 9)
                    convolved_run<9>(at, places.data(), weights, size, run, buffer + k * lanes);
                else
                    convolved_run<0>(at, places.data(), weights, size, run, buffer + k * lanes);
            }
            return reinterpret_cast<const D*>(buffer);  // D is float then
        }
        if (s.source == 1) {
            step = s.column;
            return static_cast<const D*>(s.data) + s.offsets[p] + h * s.row + x * s.column + first;
        }
        step = s.batch;
        return static_cast<const D*>(s.data) + (((p * s.channels + c) * s.height + h) * s.width + x) * s.batch + first;
    }

    long across() const { return std::max(1L, RUN / (lanes * s.pool * s.pool)); }  // pixels that leave, in a tile

    // work(coordinates, channels: begin and end of both), of which each goes over all pixels: so that memory is read on and on, and
    // what coordinates share is at hand.
    template <class Work>
    void in_order(const Work& work) const {
        if (s.source == 2) return work(begin, end, 0, s.channels);  // what planes have at a place serves all channels
        for (long c = 0; s.source == 0 && c < s.channels; ++c) work(begin, end, c, c + 1);
        for (long p = begin, next; s.source == 1 && p < end; p = next) {
            for (next = p + 1; next < end && s.channel[next] == s.channel[p];) ++next;
            work(p, next, 0, 1);
        }
    }

    // Sums over pixels and the slice -> [P, C (1 for planes), slices, 2].
    void sum(double* sums, long slice, long slices) {
        const long own = own_channels(), wide = std::max(1L, RUN / lanes);
        std::vector<Sums> found((end - begin) * own);
        const V factor = all(static_cast<float>(s.factor));
        in_order([&](long p_begin, long p_end, long c_begin, long c_end) {
            for (long h = 0; h < s.height; ++h)
                for (long x = 0; x < s.width; x += wide)
                    for (long p = p_begin; p < p_end; ++p)
                        for (long c = c_begin; c < c_end; ++c) {
                            long step, count = std::min(wide, s.width - x);
                            const D* d = changes(p, c, h, x, count, step, rows.data);
                            const X* centred = static_cast<const X*>(s.centred) +
                                               ((channel(p, c) * s.height + h) * s.width + x) * s.batch + first;
                            if (s.source == 2) await_run(centred + s.height * s.width * s.batch, count);
                            Sums& to = found[(p - begin) * own + c];
                            if (step == lanes && s.batch == lanes) {
                                add_up(d, centred, count * lanes, factor, to);
                            } else {
                                for (long k = 0; k < count; ++k) add_up(d + k * step, centred + k * s.batch, lanes, factor, to);
                            }
                        }
        });
        for (long k = 0; k < (end - begin) * own; ++k) {
            double* to = sums + ((begin * own + k) * slices + slice) * 2;
            to[0] = total(found[k].plain), to[1] = total(found[k].crossed);
        }
    }

    // The pass itself.
    template <int POOL>
    void apply(const Coefficients* coefficients) {
        const long own = own_channels(), wide = across(), pool = POOL ? POOL : s.pool;
        in_order([&](long p_begin, long p_end, long c_begin, long c_end) {
            for (long y = 0; y < s.rows; ++y)
                for (long x = 0; x < s.columns; x += wide)
                    for (long p = p_begin; p < p_end; ++p)
                        for (long c = c_begin; c < c_end; ++c)
                            tile<POOL>(p, c, y, x, std::min(wide, s.columns - x), pool, coefficients[p * own + c]);
        });
        if (!s.mean) return;
        const V part = all(1.0f / (s.rows * s.columns));
        for (long p = begin; p < end; ++p)
            for (long c = 0; c < own; ++c) {
                float* out = static_cast<float*>(s.outs) + (p * own + c) * s.batch + first;
                for (long b = 0; b < lanes; b += LANES) store(out + b, load(out + b, lanes - b) * part, lanes - b);
            }
    }

    // Of the next channel's plane, which follows a run too short to be foreseen.
    template <class T>
    INLINE void await_run(const T* from, long count) const {
        if (s.batch == lanes) return await(from, count * lanes);
        for (long k = 0; k < count; ++k) await(from + k * s.batch, lanes);
    }

    template <int POOL>
    void tile(long p, long c, long y, long x, long count, long pool, const Coefficients& k) {
        const long own = own_channels(), ch = channel(p, c), area = s.height * s.width;
        const D* d[8];
        long step = 0, row = s.width * s.batch;
        for (long i = 0; i < pool; ++i)
            d[i] = changes(p, c, y * pool + i, x * pool, count * pool, step, rows.data + i * count * pool * lanes);
        const long at = (ch * area + y * pool * s.width + x * pool) * s.batch + first;
        const X* centred = s.normalised ? static_cast<const X*>(s.centred) + at : nullptr;
        const X* value = s.value ? static_cast<const X*>(s.value) + at : nullptr;
        const long leaves = (y * s.columns + x) * s.batch + first;
        const X* left_over = s.left_over ? static_cast<const X*>(s.left_over) + ch * s.rows * s.columns * s.batch + leaves : nullptr;
        const O* dense = nullptr;
        const float* single = nullptr;
        const long beside = (y * pool * s.width + x * pool) * s.batch + first;
        if (s.residual == 1) dense = static_cast<const O*>(s.residuals) + (p * own + c) * area * s.batch + beside;
        if (s.residual == 2 && s.residual_channel[p] == ch) single = static_cast<const float*>(s.residuals) + p * area * s.batch + beside;
        if (s.source == 2)
            for (long i = 0; i < pool; ++i) {
                if (centred) await_run(centred + area * s.batch + i * row, count * pool);
                if (value) await_run(value + area * s.batch + i * row, count * pool);
            }
        float* mean = s.mean ? static_cast<float*>(s.outs) + (p * own + c) * s.batch + first : nullptr;
        O* out = s.mean ? nullptr : static_cast<O*>(s.outs) + (p * own + c) * s.rows * s.columns * s.batch + leaves;
        const Tile t{d, step, row, s.batch, lanes, count, pool, s.relu != 0, centred, value, left_over, dense, single, mean, out,
                     k.own * static_cast<float>(s.factor), k.shift, k.shrink};
        const bool known = POOL && !single && (POOL == 2 ? !dense : s.relu);
        if constexpr (POOL == 1)
            if (known && dense) return centred ? pixels<1, 4>(t) : pixels<1, 3>(t);
        if constexpr (POOL != 0)
            if (known) return centred ? pixels<POOL, 2>(t) : pixels<POOL, 1>(t);
        pixels<POOL == 1, 0>(t);
    }

    struct Tile {  // pixels that leave, one behind the other
        const D* const* changes;  // rows of a pool's window
        long step, row, batch, lanes, count, pool;
        bool relu;
        const X *centred, *value, *left_over;
        const O* dense;
        const float* single;
        float* mean;
        O* out;
        float factor, shift, shrink;
    };

    // KIND: what the compiler knows, so that the innermost loop tests nothing. 0: nothing. Bent by a ReLU or pool: 1, behind a
    // BatchNorm: 2; the same with a dense residual: 3, 4.
    template <int POOL, int KIND>
    static void pixels(const Tile& t) {
        const D* d[8];
        const long size = POOL ? POOL : t.pool, step = t.step, row = t.row, batch = t.batch;
        for (long i = 0; i < size; ++i) d[i] = t.changes[i];
        const X *centred = t.centred, *value = t.value, *left_over = t.left_over;
        const O* dense = t.dense;
        const float* single = t.single;
        const V factor = all(t.factor), shift = all(t.shift), shrink = all(t.shrink), none = {};
        const bool relu = KIND || t.relu;
        const auto leaving = [&](long n, long b, auto read) {
            V best = {};
#pragma GCC unroll 4
            for (long i = 0; i < size; ++i)
#pragma GCC unroll 4
                for (long j = 0; j < size; ++j) {
                    const long q = i * row + (n * size + j) * batch + b;
                    V z = read(d[i] + (n * size + j) * step + b) * factor;
                    if (KIND ? KIND % 2 == 0 : centred != nullptr) z += shift - read(centred + q) * shrink;
                    if (KIND ? KIND > 2 : dense != nullptr) z += read(dense + q);
                    if (!KIND && single) z += read(single + q);
                    if (POOL != 1) {
                        z += read(value + q);
                    } else if (relu) {
                        const V v = read(value + q);
                        z = largest(z + smallest(v, none), -largest(v, none));
                    }
                    best = i + j == 0 ? z : largest(best, z);
                }
            return POOL != 1 && left_over ? largest(best, -read(left_over + n * batch + b)) : best;
        };
        const bool one = POOL == 1 && batch == t.lanes && step == t.lanes && !t.mean;  // one run
        const long runs = one ? 1 : t.count, run = one ? t.count * t.lanes : t.lanes;
        float* mean = t.mean;
        O* out = t.out;
        const auto leave = [&](long n, long b, long some, V v) {
            if (mean)
                store(mean + b, load(mean + b, some) + v, some);
            else
                store(out + n * batch + b, v, some);
        };
        for (long n = 0; n < runs; ++n) {
            long b = 0;
            for (; b + LANES <= run; b += LANES) leave(n, b, LANES, leaving(n, b, [](auto* p) { return load(p); }));
            if (b < run) leave(n, b, run - b, leaving(n, b, [&](auto* p) { return load(p, run - b); }));
        }
    }
};

template <class D, class O, class X>
void pass_at_once(const Pass& s) {
    const long slices = slices_of(s.batch, SLICE), own = s.source == 1 ? 1 : s.channels;
    // coordinates that share base values in cache: those whose planes fit there, or all
    const long plane = s.source == 2 ? s.plane_height * s.plane_width * std::min<long>(s.batch, SLICE) * 4 : 0;
    const long parts = std::max(1L, std::min<long>(s.threads, s.coords * slices));
    long together = plane ? std::max(1L, (256L << 10) / plane) : 64;
    together = std::min(together, std::max(1L, (s.coords * slices + parts - 1) / parts));
    const long groups = (s.coords + together - 1) / together;
    const auto each = [&](const auto& work) {
        parallel(groups * slices, s.threads, [&](long begin, long end) {
            for (long k = begin; k < end; ++k) {
                const long from = k / slices * together, slice = k % slices, first = slice * SLICE;
                Worker<D, O, X> worker(s, from, std::min<long>(s.coords, from + together), first,
                                       std::min<long>(SLICE, s.batch - first));
                work(worker, slice);
            }
        });
    };
    std::vector<Coefficients> found(s.coords * own, Coefficients{1, 0, 0});
    if (s.normalised) {
        std::vector<double> sums(s.means ? 0 : s.coords * own * slices * 2);
        if (!s.means) each([&](auto& worker, long slice) { worker.sum(sums.data(), slice, slices); });
        for (long k = 0; k < s.coords * own; ++k) {
            double mean = 0, crossed = 0;
            if (s.means) {
                mean = s.means[2 * k], crossed = s.means[2 * k + 1];
            } else {
                for (long i = 0; i < slices; ++i) mean += sums[(k * slices + i) * 2], crossed += sums[(k * slices + i) * 2 + 1];
                mean /= s.count, crossed /= s.count;
            }
            const long c = s.source == 1 ? s.channel[k] : k % own;
            found[k] = coefficients(mean, crossed, s.scale[c], s.gamma[c]);
        }
    }
    each([&](auto& worker, long) {
        if (s.pool == 1)
            worker.template apply<1>(found.data());
        else if (s.pool == 2)
            worker.template apply<2>(found.data());
        else
            worker.template apply<0>(found.data());
    });
}

template <class D, class O, class X>
void pass(Pass s) {
    if (s.source != 1 || !s.normalised || s.threads > 1) return pass_at_once<D, O, X>(s);
    const long coords = s.coords, out = s.mean ? s.batch : s.rows * s.columns * s.batch;
    for (long p = 0; p < coords; p += s.coords) {  // those of one channel: the pass finds what the sums have read in a cache
        s.coords = 1;
        while (p + s.coords < coords && s.channel[s.coords] == s.channel[0]) ++s.coords;
        pass_at_once<D, O, X>(s);
        s.offsets += s.coords, s.channel += s.coords;
        s.outs = static_cast<float*>(s.outs) + s.coords * out;
    }
}

// A convolution and the pass behind it, few coordinates at a time: what the convolution makes stays in a cache.
template <class T>
void layer(Convolution conv, Pass behind, void (*convolve)(const Convolution&), long slices) {
    const long in = conv.channels * conv.height * conv.width * conv.batch, out = conv.outputs * conv.rows * conv.columns * conv.batch;
    const long coords = conv.coords, together = std::min(coords, std::max<long>(1, conv.threads));
    std::vector<double> sums(conv.centred ? together * conv.outputs * slices * 2 : 0), means(together * conv.outputs * 2);
    conv.sums = sums.data();
    behind.data = conv.outs;
    behind.means = conv.centred ? means.data() : nullptr;
    for (long p = 0; p < coords; p += together) {
        conv.coords = behind.coords = std::min(together, coords - p);
        convolve(conv);
        for (long k = 0; conv.centred && k < conv.coords * conv.outputs * 2; ++k) {
            means[k] = 0;
            for (long i = 0; i < slices; ++i) means[k] += sums[(k / 2 * slices + i) * 2 + k % 2];
            means[k] /= behind.count;
        }
        pass<T, T, T>(behind);
        conv.images = static_cast<const T*>(conv.images) + conv.coords * in;
        if (behind.residual == 1) behind.residuals = static_cast<const T*>(behind.residuals) + conv.coords * out;
        if (behind.residual == 2) {
            behind.residuals = static_cast<const float*>(behind.residuals) + conv.coords * out / conv.outputs;
            behind.residual_channel += conv.coords;
        }
        if (behind.mean)
            behind.outs = static_cast<float*>(behind.outs) + conv.coords * conv.outputs * conv.batch;
        else
            behind.outs = static_cast<T*>(behind.outs) + conv.coords * conv.outputs * behind.rows * behind.columns * conv.batch;
    }
}

// -------------------------------------------------------------------------------------------------------------------------- loss

// exp(x) - 1 = 2^n (exp(f) - 1) + 2^n - 1, x = n log 2 + f; |x| at most 10.
inline V expm1(V x) {
    const V magic = all(12582912.0f);  // 1.5 2^23: rounds to integers
    const V n = (x * 1.44269504f + magic) - magic;
    const V f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    V sum = all(1.0f / 362880);
    for (float c : {1.0f / 40320, 1.0f / 5040, 1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f}) sum = sum * f + c;
    const V power = as<V>(as<Bits>(n + (magic + 127)) << 23);
    return power * (sum * f) + (power - 1);
}

// log(1 + x) = e log 2 + 2 artanh((m - 1) / (m + 1)), 1 + x = 2^e m.
inline V log1p(V x) {
    const Bits bits = as<Bits>(x + 1) - 0x3f3504f3;  // m between sqrt(1/2) and sqrt(2)
    const auto exponent = as<decltype(x < x)>(bits) >> 23;
    const V m = as<V>((bits & 0x7fffff) + 0x3f3504f3), e = __builtin_convertvector(exponent, V);
    const V top = e == 0 ? x : m - 1, s = top / (top + 2), q = s * s;
    V sum = all(2.0f / 13);
    for (float c : {2.0f / 11, 2.0f / 9, 2.0f / 7, 2.0f / 5, 2.0f / 3, 2.0f}) sum = sum * q + c;
    return e * 0.693147181f + s * sum;
}

constexpr float LARGE = 10;

// Mean over the batch of log sum_k p_k exp(d_k - d_y), d [K, B].
double cross_entropy(const float* d, const float* log_p, const float* p, const int64_t* targets, long batch, long classes) {
    double sum = 0;
    for (long b = 0; b < batch; b += LANES) {
        const long count = std::min<long>(LANES, batch - b);
        float own[LANES] = {};
        for (long i = 0; i < count; ++i) own[i] = d[targets[b + i] * batch + b + i];
        const V base = load(own);
        V r = {}, top = {};
        for (long k = 0; k < classes; ++k) {
            const V x = load(d + k * batch + b, count) - base, size = x < 0 ? -x : x;
            top = largest(size, top);
            r += load(p + k * batch + b, count) * expm1(x);
        }
        float found[LANES], sizes[LANES];
        store(found, log1p(r) + (r - r));  // NaN stays
        store(sizes, top);
        for (long i = 0; i < count; ++i) {
            if (sizes[i] < LARGE) {
                sum += found[i];
                continue;
            }
            double highest = -INFINITY, total = 0;  // nothing cancels
            for (long k = 0; k < classes; ++k)
                highest = std::max(highest, double(log_p[k * batch + b + i]) + d[k * batch + b + i] - own[i]);
            for (long k = 0; k < classes; ++k)
                total += std::exp(double(log_p[k * batch + b + i]) + d[k * batch + b + i] - own[i] - highest);
            sum += highest + std::log(total);
        }
    }
    return sum / batch;
}

}  // namespace

// 3 x 3, stride 1, by Winograd's F(4 x 4, 3 x 3): 36 products for 16 outputs instead of 144 (Lavin and Gray, Fast Algorithms for
// Convolutional Neural Networks, CVPR 2016). kernels [O / 8, 36, C, 8], O filled up by zeros; of halves in MANY channels, where there
// are products of pairs, [O / 8, 36 C / 2 + 36, 8]: whole numbers, and behind them what one of them means.
extern "C" void winograd_floats(const Convolution* s) { winograd<float>(*s); }
extern "C" void winograd_halves(const Convolution* s) { winograd<Half>(*s); }
extern "C" int64_t winograd_floats_slices(const Convolution* s) { return slices_of(s->batch, winograd_slice<float>(*s)); }
extern "C" int64_t winograd_halves_slices(const Convolution* s) { return slices_of(s->batch, winograd_slice<Half>(*s)); }

// Any kernel, stride and dilation. kernels [O / 8, kh, kw, C, 8], O filled up by zeros; of halves where there are products of pairs
// [O / 8, kh, kw, C / 2, 8] of bfloat16.
extern "C" void direct_floats(const Convolution* s) { direct<float>(*s); }
extern "C" void direct_halves(const Convolution* s) { direct<Half>(*s); }
extern "C" int64_t direct_floats_slices(const Convolution* s) { return slices_of(s->batch, direct_slice(*s)); }
extern "C" int64_t direct_halves_slices(const Convolution* s) { return slices_of(s->batch, direct_slice(*s)); }

// A convolution into conv.outs, of as many coordinates as there are threads, and the pass behind it.
#define AND_BEHIND(HOW, KIND, T)                                                  \
    extern "C" void HOW##_##KIND##_and(const Convolution* s, const Pass* behind) { \
        layer<T>(*s, *behind, HOW<T>, HOW##_##KIND##_slices(s));                   \
    }
AND_BEHIND(winograd, floats, float)
AND_BEHIND(winograd, halves, Half)
AND_BEHIND(direct, floats, float)
AND_BEHIND(direct, halves, Half)

// Changes and base values of floats; planes to halves, beside base values of halves; all of halves.
extern "C" void pass_floats(const Pass* s) { pass<float, float, float>(*s); }
extern "C" void pass_rounding(const Pass* s) { pass<float, Half, Half>(*s); }
extern "C" void pass_halves(const Pass* s) { pass<Half, Half, Half>(*s); }

// Changes [P, K, B] of logits -> those of the mean cross entropy [P]; log p and p [K, B] at theta.
extern "C" void cross_entropies(const float* changes, const float* log_p, const float* p, const int64_t* targets, float* out,
                                int64_t coords, int64_t batch, int64_t classes, int64_t threads) {
    parallel(coords, threads, [&](long begin, long end) {
        for (long k = begin; k < end; ++k)
            out[k] = static_cast<float>(cross_entropy(changes + k * classes * batch, log_p, p, targets, batch, classes));
    });
}
