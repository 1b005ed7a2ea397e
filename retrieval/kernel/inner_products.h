// Inner products of float32 and 8-bit queries with rows of smaller numbers, by AVX2, FMA and F16C.

#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

// Asks for bytes in advance.
void fetch(const void* start, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(static_cast<const char*>(start) + i, _MM_HINT_T0);
}

float sum(__m256 values) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(values), _mm256_extractf128_ps(values, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

// Eight numbers of a row, and one.
struct Half {
    static __m256 eight(const uint16_t* row) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)row)); }
    static float one(uint16_t value) { return _cvtsh_ss(value); }
};

struct Bfloat {
    static __m256 eight(const uint16_t* row) {
        const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)row));
        return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
    }
    static float one(uint16_t value) { return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(value << 16))); }
};

template <class Format>
float inner_product(const float* query, const uint16_t* row, int64_t dim) {
    __m256 sums[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
    int64_t i = 0;
    for (; i + 32 <= dim; i += 32)
        for (int64_t j = 0; j < 4; ++j)
            sums[j] = _mm256_fmadd_ps(_mm256_loadu_ps(query + i + 8 * j), Format::eight(row + i + 8 * j), sums[j]);
    float total = sum(_mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3])));
    for (; i < dim; ++i) total += query[i] * Format::one(row[i]);
    return total;
}

// Inner product of numbers in [-127, 127].
int32_t inner_product(const int8_t* query, const int8_t* row, int64_t dim) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i sums = _mm256_setzero_si256();
    int64_t i = 0;
    for (; i + 32 <= dim; i += 32) {
        const __m256i left = _mm256_loadu_si256((const __m256i*)(row + i));
        const __m256i right = _mm256_loadu_si256((const __m256i*)(query + i));
        const __m256i products = _mm256_maddubs_epi16(_mm256_abs_epi8(left), _mm256_sign_epi8(right, left));
        sums = _mm256_add_epi32(sums, _mm256_madd_epi16(products, ones));
    }
    __m128i half = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    int32_t total = _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
    for (; i < dim; ++i) total += query[i] * row[i];
    return total;
}

float smallest(__m256 values) {
    __m128 half = _mm_min_ps(_mm256_castps256_ps128(values), _mm256_extractf128_ps(values, 1));
    half = _mm_min_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_min_ss(half, _mm_movehdup_ps(half)));
}

} // namespace
