// 3 x 3 convolutions of images [N, H, W, C] by Winograd's F(2 x 2, 3 x 3): four outputs from 16 products a channel instead of 36.
// Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016: Y = A' [(G g G') * (B' d B)] A.
//
// A block of tiles is transformed, multiplied and transformed back while it is in a core's first cache, and the sums that a
// BatchNorm behind the convolution needs are made of the outputs while they are in registers. AVX-512. Channels are filled up to
// multiples of 16 by zeros, in the scratch memory only.

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

namespace {

constexpr int TILES = 16;  // in a block
constexpr __mmask16 ALL = 0xffff;

inline int filled(int channels) { return (channels + 15) / 16 * 16; }

inline __m512 broadcast(const void* p) {
    float v;
    std::memcpy(&v, p, 4);
    return _mm512_set1_ps(v);
}

// What the algorithm needs of an element type: 16 of them as floats, and a step of a sum over channels.
struct Float {
    using Element = float;
    static constexpr int STEP = 1;  // channels that one instruction multiplies and sums
    static __m512 load(const float* p, __mmask16 mask = ALL) { return _mm512_maskz_loadu_ps(mask, p); }
    static void store(float* p, __m512 v, __mmask16 mask = ALL) { _mm512_mask_storeu_ps(p, mask, v); }
    static __m512 multiply_add(__m512 sum, const float* a, __m512 b) { return _mm512_fmadd_ps(broadcast(a), b, sum); }
};

#ifdef __AVX512BF16__
struct BFloat16 {
    using Element = uint16_t;
    static constexpr int STEP = 2;
    static __m512 load(const uint16_t* p, __mmask16 mask = ALL) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)), 16));
    }
    static void store(uint16_t* p, __m512 v, __mmask16 mask = ALL) {
        _mm256_mask_storeu_epi16(p, mask, (__m256i)_mm512_cvtneps_pbh(v));
    }
    static __m512 multiply_add(__m512 sum, const uint16_t* a, __m512 b) {
        return _mm512_dpbf16_ps(sum, (__m512bh)broadcast(a), (__m512bh)b);
    }
};
#endif

// Vectors of channels in the input transform: 16 in their order, or 32 bfloat16 as the even and the odd ones.
template <class Type>
struct Vector {
    static constexpr int CHANNELS = 16;
    __m512 v;
    static Vector load(const typename Type::Element* p) { return {Type::load(p)}; }
    void store(typename Type::Element* p) const { Type::store(p, v); }
    Vector operator+(Vector b) const { return {_mm512_add_ps(v, b.v)}; }
    Vector operator-(Vector b) const { return {_mm512_sub_ps(v, b.v)}; }
};

template <class Type>
struct WidestOf {
    using Result = Vector<Type>;
};

#ifdef __AVX512BF16__
struct EvenOdd {
    static constexpr int CHANNELS = 32;
    __m512 even, odd;
    static EvenOdd load(const uint16_t* p) {
        const __m512i v = _mm512_loadu_si512(p);
        const __m512i odd = _mm512_and_si512(v, _mm512_set1_epi32(static_cast<int>(0xffff0000)));
        return {_mm512_castsi512_ps(_mm512_slli_epi32(v, 16)), _mm512_castsi512_ps(odd)};
    }
    void store(uint16_t* p) const { _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(odd, even)); }
    EvenOdd operator+(EvenOdd b) const { return {_mm512_add_ps(even, b.even), _mm512_add_ps(odd, b.odd)}; }
    EvenOdd operator-(EvenOdd b) const { return {_mm512_sub_ps(even, b.even), _mm512_sub_ps(odd, b.odd)}; }
};

template <>
struct WidestOf<BFloat16> {
    using Result = EvenOdd;
};
#endif

struct Shape {
    int coords, batch, height, width, channels, top, left, rows, columns, outputs;  // rows, columns: of the outputs
    int tall() const { return (rows + 1) / 2; }    // tiles
    int wide() const { return (columns + 1) / 2; }
};

// Row-major positions of tiles.
struct Walk {
    int y, x, wide;
    Walk(int tile, int wide) : y(tile / wide), x(tile % wide), wide(wide) {}
    void next() {
        if (++x == wide) x = 0, ++y;
    }
};

// One column of B' d, of four rows that lie `row` elements apart.
template <class V, class Element>
inline void column(const Element* p, long row, V out[4]) {
    const V a = V::load(p), b = V::load(p + row), c = V::load(p + 2 * row), d = V::load(p + 3 * row);
    out[0] = a - c, out[1] = b + c, out[2] = c - b, out[3] = b - d;
}

// B' d B of `count` tiles -> [16, TILES, C]; neighbours in a row share two columns.
template <class V, class Element>
void transform_inputs(const Element* image, long row, int channels, int wide, int first, int count, Element* out) {
    const long step = static_cast<long>(TILES) * channels;
    for (int c = 0; c < channels; c += V::CHANNELS) {
        V w[4][4];
        Walk at(first, wide);
        for (int t = 0; t < count; ++t, at.next()) {
            const Element* p = image + 2 * at.y * row + 2L * at.x * channels + c;
            if (t == 0 || at.x == 0) {
                column(p, row, w[0]);
                column(p + channels, row, w[1]);
            } else {
                for (int i = 0; i < 4; ++i) w[0][i] = w[2][i], w[1][i] = w[3][i];
            }
            column(p + 2 * channels, row, w[2]);
            column(p + 3 * channels, row, w[3]);
            Element* q = out + static_cast<long>(t) * channels + c;
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i, q += 4 * step) {
                (w[0][i] - w[2][i]).store(q);
                (w[1][i] + w[2][i]).store(q + step);
                (w[2][i] - w[1][i]).store(q + 2 * step);
                (w[1][i] - w[3][i]).store(q + 3 * step);
            }
        }
    }
}

// [COUNT tiles, C] times [C, 16 VECTORS] -> [COUNT, 16 VECTORS], all sums in registers.
template <class Type, int VECTORS, int COUNT>
inline void multiply(const typename Type::Element* a, const typename Type::Element* b, int channels, int outputs, float* out) {
    __m512 sum[COUNT][VECTORS];
#pragma GCC unroll 16
    for (int t = 0; t < COUNT; ++t)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) sum[t][v] = _mm512_setzero_ps();
    for (int c = 0; c < channels; c += Type::STEP) {
        __m512 row[VECTORS];
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v)
            row[v] = _mm512_loadu_ps(reinterpret_cast<const float*>(b + static_cast<long>(c) * outputs) + 16 * v);
#pragma GCC unroll 16
        for (int t = 0; t < COUNT; ++t)
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; ++v)
                sum[t][v] = Type::multiply_add(sum[t][v], a + static_cast<long>(t) * channels + c, row[v]);
    }
#pragma GCC unroll 16
    for (int t = 0; t < COUNT; ++t)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) _mm512_store_ps(out + (t * VECTORS + v) * 16, sum[t][v]);
}

// A' m A of up to 16 outputs of `count` tiles into an image; with `centred` (x_c) adds sum D and sum D (2 x_c + D) to `sums`.
template <class Type>
inline void transform_outputs(const float* products, int width, const Shape& s, int first, int count, __mmask16 mask,
                              typename Type::Element* image, const typename Type::Element* centred, float* sums) {
    __m512 plain = _mm512_setzero_ps(), crossed = plain, squared = plain;
    const long step = static_cast<long>(TILES) * width;
    Walk at(first, s.wide());
    for (int t = 0; t < count; ++t, at.next()) {
        const float* m = products + static_cast<long>(t) * width;
        __m512 r[2][4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            const __m512 a = _mm512_load_ps(m + j * step), b = _mm512_load_ps(m + (4 + j) * step);
            const __m512 c = _mm512_load_ps(m + (8 + j) * step), d = _mm512_load_ps(m + (12 + j) * step);
            r[0][j] = _mm512_add_ps(a, _mm512_add_ps(b, c));
            r[1][j] = _mm512_sub_ps(_mm512_sub_ps(b, c), d);
        }
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
            const __m512 pair[2] = {_mm512_add_ps(r[i][0], _mm512_add_ps(r[i][1], r[i][2])),
                                    _mm512_sub_ps(_mm512_sub_ps(r[i][1], r[i][2]), r[i][3])};
#pragma GCC unroll 2
            for (int j = 0; j < 2; ++j) {
                if (2 * at.y + i >= s.rows || 2 * at.x + j >= s.columns) continue;
                const long k = (static_cast<long>(2 * at.y + i) * s.columns + 2 * at.x + j) * s.outputs;
                Type::store(image + k, pair[j], mask);
                if (!centred) continue;
                plain = _mm512_add_ps(plain, pair[j]);
                crossed = _mm512_fmadd_ps(pair[j], Type::load(centred + k, mask), crossed);
                squared = _mm512_fmadd_ps(pair[j], pair[j], squared);
            }
        }
    }
    if (!centred) return;
    Float::store(sums, _mm512_add_ps(Float::load(sums, mask), plain), mask);
    sums += s.outputs;
    const __m512 both = _mm512_add_ps(_mm512_add_ps(crossed, crossed), squared);
    Float::store(sums, _mm512_add_ps(Float::load(sums, mask), both), mask);
}

template <class T>
struct Scratch {  // zeros, aligned for vectors
    T* data;
    explicit Scratch(size_t count) {
        const size_t bytes = (count * sizeof(T) + 127) / 64 * 64;
        data = static_cast<T*>(std::aligned_alloc(64, bytes));
        std::memset(data, 0, bytes);
    }
    ~Scratch() { std::free(data); }
};

// Samples [begin, end) of the batch, all coordinates of each: the centred values stay in cache.
template <class Type>
void convolve(const typename Type::Element* x, const typename Type::Element* kernels, typename Type::Element* y,
              const typename Type::Element* centred, float* sums, const Shape& s, int begin, int end) {
    using Element = typename Type::Element;
    using Widest = typename WidestOf<Type>::Result;
    const int channels = filled(s.channels), outputs = filled(s.outputs);
    const long row = (2L * s.wide() + 2) * channels, pixels = static_cast<long>(s.height) * s.width;
    const int tiles = s.tall() * s.wide(), tall = 2 * s.tall() + 2;
    Scratch<Element> padded(row * tall), transformed(16L * TILES * channels);
    Scratch<float> products(16L * TILES * 32);
    for (int n = begin; n < end; ++n) {
        for (int p = 0; p < s.coords; ++p) {
            const long image = static_cast<long>(p) * s.batch + n;
            const Element* in = x + image * pixels * s.channels;
            const bool more = p + 1 < s.coords || n + 1 < end;
            const Element* next = x + (p + 1 < s.coords ? image + s.batch : n + 1) * pixels * s.channels;
            for (int h = 0; h < s.height; ++h) {
                Element* to = padded.data + (h + s.top) * row + static_cast<long>(s.left) * channels;
                const Element* from = in + static_cast<long>(h) * s.width * s.channels;
                const int pieces = channels == s.channels ? 1 : s.width, piece = s.width / pieces * s.channels;
                for (int k = 0; k < pieces; ++k, to += channels, from += piece) std::memcpy(to, from, sizeof(Element) * piece);
            }
            Element* out = y + image * s.rows * s.columns * s.outputs;
            const Element* beside = centred ? centred + static_cast<long>(n) * s.rows * s.columns * s.outputs : nullptr;
            float* own = sums ? sums + image * 2 * s.outputs : nullptr;
            if (own) std::memset(own, 0, sizeof(float) * 2 * s.outputs);
            for (int first = 0; first < tiles; first += TILES) {
                const int count = std::min(TILES, tiles - first);
                if (channels % Widest::CHANNELS == 0)
                    transform_inputs<Widest>(padded.data, row, channels, s.wide(), first, count, transformed.data);
                else
                    transform_inputs<Vector<Type>>(padded.data, row, channels, s.wide(), first, count, transformed.data);
                if (more) {  // the next image is on its way while this one is worked on
                    const long size = pixels * s.channels, from = size * first / tiles, to = size * (first + count) / tiles;
                    for (long k = from; k < to; k += 64 / sizeof(Element)) _mm_prefetch((const char*)(next + k), _MM_HINT_T1);
                }
                for (int o = 0; o < outputs; o += 32) {
                    const int width = std::min(32, outputs - o);
                    for (int k = 0; k < 16; ++k) {
                        const Element* a = transformed.data + static_cast<long>(k) * TILES * channels;
                        const Element* b = kernels + static_cast<long>(k) * channels * outputs + Type::STEP * o;
                        float* m = products.data + k * TILES * width;
                        if (width == 16) {
                            multiply<Type, 1, TILES>(a, b, channels, outputs, m);
                        } else {
                            multiply<Type, 2, TILES / 2>(a, b, channels, outputs, m);
                            multiply<Type, 2, TILES / 2>(a + TILES / 2 * channels, b, channels, outputs, m + TILES / 2 * 32);
                        }
                    }
                    for (int w = 0; w < width; w += 16) {
                        Element* to = out + o + w;
                        const Element* x_c = beside ? beside + o + w : nullptr;
                        float* sum = own ? own + o + w : nullptr;
                        const int left = s.outputs - o - w;
                        if (left >= 16)
                            transform_outputs<Type>(products.data + w, width, s, first, count, ALL, to, x_c, sum);
                        else
                            transform_outputs<Type>(products.data + w, width, s, first, count, (1 << left) - 1, to, x_c, sum);
                    }
                }
            }
        }
    }
}

template <class Type>
void run(const void* x, const void* kernels, void* y, const void* centred, float* sums, const Shape& s, int threads) {
    using Element = typename Type::Element;
    const int parts = std::max(1, std::min(threads, s.batch));
    const auto part = [&](int k) {
        const int begin = static_cast<int>(static_cast<long>(s.batch) * k / parts);
        const int end = static_cast<int>(static_cast<long>(s.batch) * (k + 1) / parts);
        convolve<Type>(static_cast<const Element*>(x), static_cast<const Element*>(kernels), static_cast<Element*>(y),
                       static_cast<const Element*>(centred), sums, s, begin, end);
    };
    std::vector<std::thread> others;
    for (int k = 1; k < parts; ++k) others.emplace_back(part, k);
    part(0);
    for (auto& t : others) t.join();
}

}  // namespace

// x [P, B, H, W, C], kernels [16, C / STEP, O, STEP] (C and O filled up), y [P, B, H', W', O]; centred [B, H', W', O] and
// sums [P, B, 2, O], or null. Returns 1, with nothing done, where it was compiled without bfloat16 products and they are asked for.
// shape: P, B, H, W, C, zeros above, zeros on the left, H', W', O. Sums of an image do not depend on threads or other images.
extern "C" int winograd(const void* x, const void* kernels, void* y, const void* centred, float* sums, const int32_t* shape,
                        int bfloat16, int threads) {
    Shape s;
    static_assert(sizeof(Shape) == 10 * sizeof(int32_t), "a shape is ten numbers");
    std::memcpy(&s, shape, sizeof(s));
#ifdef __AVX512BF16__
    if (bfloat16) return run<BFloat16>(x, kernels, y, centred, sums, s, threads), 0;
#endif
    if (bfloat16) return 1;
    return run<Float>(x, kernels, y, centred, sums, s, threads), 0;
}
