// The 4-bit codes of rows in inverted lists, as faiss.IndexIVFPQ computes them for codes of two dimensions.
//
// A code is the number of the codeword that is nearest to two numbers of the residual, of equally near ones the first.
// Eight codes are compared at once; faiss compares them one by one.

#pragma once

#include "inner_products.h"

#include <cstdint>
#include <limits>
#include <vector>

namespace {

constexpr int64_t CODEWORDS = 16;
constexpr int64_t CODES_AT_ONCE = 8;

// Codewords and rows. Pointers are borrowed.
struct RowCodes {
    int64_t dim;               // even
    const float* codewords;    // (groups of 8 codes, 16, 2, 8): the first, then the second numbers of 8 codes
    const float* centroids;    // (lists, dim)
    const uint16_t* rows;      // (rows, dim) float16
};

// Writes the codes of rows one after the other.
class RowEncoder {
  public:
    explicit RowEncoder(const RowCodes& codes)
        : codes_(codes), groups_((codes.dim / 2 + CODES_AT_ONCE - 1) / CODES_AT_ONCE),
          residual_(2 * CODES_AT_ONCE * groups_), numbers_(CODES_AT_ONCE * groups_) {}

    // Writes the codes of a row in a list, two in a byte, the first one in the lower half: (dim / 2 + 1) / 2 bytes.
    void run(int64_t row, int64_t list, uint8_t* bytes) {
        const uint16_t* numbers = codes_.rows + row * codes_.dim;
        const float* centroid = codes_.centroids + list * codes_.dim;
        int64_t i = 0;
        for (; i + 8 <= codes_.dim; i += 8)
            _mm256_storeu_ps(&residual_[i], _mm256_sub_ps(Half::eight(numbers + i), _mm256_loadu_ps(centroid + i)));
        for (; i < codes_.dim; ++i) residual_[i] = Half::one(numbers[i]) - centroid[i];
        for (int64_t group = 0; group < groups_; ++group) encode(group);
        const int64_t count = codes_.dim / 2; // behind them are codes of zeros
        for (int64_t code = 0; code < count; code += 2)
            bytes[code / 2] = numbers_[code] | (code + 1 < count ? numbers_[code + 1] << 4 : 0);
    }

  private:
    void encode(int64_t group) {
        const float* pairs = &residual_[2 * CODES_AT_ONCE * group];
        const __m256 low = _mm256_loadu_ps(pairs), high = _mm256_loadu_ps(pairs + 8);
        const __m256 first = in_order(_mm256_shuffle_ps(low, high, 0x88));
        const __m256 second = in_order(_mm256_shuffle_ps(low, high, 0xDD));
        const float* codeword = codes_.codewords + 2 * CODES_AT_ONCE * CODEWORDS * group;
        __m256 least = _mm256_set1_ps(std::numeric_limits<float>::infinity());
        __m256i nearest = _mm256_setzero_si256();
        for (int number = 0; number < CODEWORDS; ++number, codeword += 2 * CODES_AT_ONCE) {
            const __m256 x = _mm256_sub_ps(first, _mm256_loadu_ps(codeword));
            const __m256 y = _mm256_sub_ps(second, _mm256_loadu_ps(codeword + CODES_AT_ONCE));
            const __m256 distance = _mm256_fmadd_ps(y, y, _mm256_mul_ps(x, x));
            const __m256 nearer = _mm256_cmp_ps(distance, least, _CMP_LT_OQ);
            least = _mm256_blendv_ps(least, distance, nearer);
            nearest = _mm256_blendv_epi8(nearest, _mm256_set1_epi32(number), _mm256_castps_si256(nearer));
        }
        _mm256_storeu_si256((__m256i*)&numbers_[CODES_AT_ONCE * group], nearest);
    }

    // The halves of a shuffle of two vectors have numbers 0, 1, 4, 5 and 2, 3, 6, 7.
    static __m256 in_order(__m256 shuffled) {
        return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(shuffled), 0xD8));
    }

    const RowCodes& codes_;
    const int64_t groups_;
    std::vector<float> residual_;
    std::vector<int32_t> numbers_;
};

} // namespace
