// Inner products of float32 and 8-bit queries with rows of smaller numbers, by AVX2, FMA and F16C.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

// Asks for bytes in advance. They come to the second cache, which waits for more of them at once than the first.
void fetch(const void* start, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(static_cast<const char*>(start) + i, _MM_HINT_T1);
}

float sum(__m256 values) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(values), _mm256_extractf128_ps(values, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

float smallest(__m256 values) {
    __m128 half = _mm_min_ps(_mm256_castps256_ps128(values), _mm256_extractf128_ps(values, 1));
    half = _mm_min_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_min_ss(half, _mm_movehdup_ps(half)));
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

// A query in whole numbers, for inner products with rows of numbers in [-127, 127].
class RoundedQuery {
  public:
    void set(const float* query, int64_t dim) {
        const float largest = largest_size(query, dim), scale = 127 / largest;
        unit = largest / 127;
        numbers_.resize(dim);
        sizes_.resize(dim);
        int64_t i = 0;
        for (; i + 32 <= dim; i += 32) {
            const __m256i numbers = rounded(query + i, scale);
            _mm256_storeu_si256((__m256i*)&numbers_[i], numbers);
            _mm256_storeu_si256((__m256i*)&sizes_[i], _mm256_abs_epi8(numbers));
        }
        for (; i < dim; ++i) {
            numbers_[i] = int8_t(std::lrint(query[i] * scale));
            sizes_[i] = uint8_t(std::abs(numbers_[i]));
        }
    }

    int32_t inner_product(const int8_t* row) const {
        const int64_t dim = numbers_.size();
        __m256i sums[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
        int64_t i = 0;
        for (; i + 64 <= dim; i += 64)
            for (int64_t j = 0; j < 2; ++j) sums[j] = _mm256_add_epi32(sums[j], products(row, i + 32 * j));
        if (i + 32 <= dim) {
            sums[0] = _mm256_add_epi32(sums[0], products(row, i));
            i += 32;
        }
        const __m256i both = _mm256_add_epi32(sums[0], sums[1]);
        __m128i half = _mm_add_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
        half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
        int32_t total = _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
        for (; i < dim; ++i) total += numbers_[i] * row[i];
        return total;
    }

    float unit = 0; // of the numbers

  private:
    // The largest absolute value, at least 1e-30.
    static float largest_size(const float* query, int64_t dim) {
        __m256 negative = _mm256_setzero_ps(); // of the largest sizes
        const __m256 sign = _mm256_set1_ps(-0.f);
        int64_t i = 0;
        for (; i + 8 <= dim; i += 8)
            negative = _mm256_min_ps(negative, _mm256_or_ps(sign, _mm256_loadu_ps(query + i)));
        float largest = std::max(1e-30f, -smallest(negative));
        for (; i < dim; ++i) largest = std::max(largest, std::abs(query[i]));
        return largest;
    }

    // 32 numbers times a scale, as whole numbers.
    static __m256i rounded(const float* query, float scale) {
        __m256i parts[4];
        for (int64_t j = 0; j < 4; ++j)
            parts[j] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(query + 8 * j), _mm256_set1_ps(scale)));
        const __m256i low = _mm256_packs_epi32(parts[0], parts[1]), high = _mm256_packs_epi32(parts[2], parts[3]);
        const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7); // packing mixes the halves
        return _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
    }

    // Sums of 4 products of numbers from i on, for 32 of them.
    __m256i products(const int8_t* row, int64_t i) const {
        const __m256i signed_row = _mm256_sign_epi8(
            _mm256_loadu_si256((const __m256i*)(row + i)), _mm256_loadu_si256((const __m256i*)&numbers_[i]));
        const __m256i pairs = _mm256_maddubs_epi16(_mm256_loadu_si256((const __m256i*)&sizes_[i]), signed_row);
        return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    }

    std::vector<int8_t> numbers_;
    std::vector<uint8_t> sizes_; // their absolute values
};

} // namespace
